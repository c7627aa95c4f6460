"""What is said: messages, codec, framing, activation frames and their limits. Pure."""
