"""`python -m hf_daq.cli`."""

from .main import main

main()
