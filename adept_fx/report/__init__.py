"""What the project says about itself, made from the code."""
