"""Entry point of `python -m scripts.bench`."""

from scripts.bench import main

main.run()
