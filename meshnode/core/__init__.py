"""What is decided: sans-IO state machines. Time comes in as an argument, effects go out as values."""
