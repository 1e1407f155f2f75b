"""Train: `accelerate launch examples/train.py` is `nrccr train`, started by Accelerate."""

from modeling_nrccr.cli.train import main


if __name__ == "__main__":
    main()
