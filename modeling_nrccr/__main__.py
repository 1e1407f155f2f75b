"""`python -m modeling_nrccr` is `nrccr`."""

from .cli.main import main


main()
