"""Pipeline schedules, their simulation and their execution."""
