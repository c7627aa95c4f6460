"""What is done: one folder or file per outside thing. Obeys core, decides nothing."""
