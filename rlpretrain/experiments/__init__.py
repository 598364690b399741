"""Methods × seeds from one base, with matched budgets."""
