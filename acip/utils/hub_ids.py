"""Regular expressions for repository names on the Hugging Face hub."""

HUB_ID = r"[\w.-]+/[\w.-]+"  # org/name
REVISION = r"(@[\w./-]+)?"  # optional @branch, @tag or @commit
