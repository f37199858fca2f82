"""How the work is spread over devices."""
