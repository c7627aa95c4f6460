"""`meshnode bench`: what splitting costs on this machine, measured against plain llama.cpp in the same minutes."""
