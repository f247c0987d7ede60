"""Run folder, progress display, TensorBoard event files and robust output."""
