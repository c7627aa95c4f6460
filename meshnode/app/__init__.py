"""How it is assembled: configuration, the runtime that executes effects, processes, command line."""
