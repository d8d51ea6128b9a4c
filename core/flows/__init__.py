"""What one asks of a whole model: prove it, measure it, show it. Here core, compile and runtimes meet."""
