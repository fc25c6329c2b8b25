"""Documents to the rows that are trained on."""
