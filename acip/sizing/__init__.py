"""Convert a budget to a rank per layer: budgets, score maps, cut tables, and models that change their size."""
