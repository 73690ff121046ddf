"""The form of repository names on the Hugging Face hub, as regular expressions."""

HUB_ID = r"[\w.-]+/[\w.-]+"  # a repository of the hub
REVISION = r"(@[\w./-]+)?"  # of it
