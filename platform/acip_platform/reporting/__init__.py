"""Reports for people: console screens, figures and the HTML report."""
