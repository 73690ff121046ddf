"""Everything that a person reads: console screens, figures, the HTML report."""
