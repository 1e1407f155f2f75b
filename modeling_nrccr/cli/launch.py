"""Starts several processes of a command on one machine."""

import logging
import os
import sys


WORKER = "NRCCR_WORKER"  # is set in each process; who started them shows how they ended


def start_processes(command: str, arguments: list[str], count: int):
    """
    Run `nrccr command` in several processes that train together, and wait for them.

    Raises:
        KeyboardInterrupt: after Ctrl+C.
        ValueError: with the message of the first process that could not go on.
        SystemExit: where it ended by a fault of its own, whose traceback it has shown.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for part in ("agent.server.api", "multiprocessing.api"):  # each says in forty lines how a process ended
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    os.environ[WORKER] = "1"
    module = ["--module", "modeling_nrccr", command]
    try:
        run(parse_args(["--standalone", "--nproc_per_node", str(count), *module, *arguments]))
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2:
            raise ValueError(str(failure.message).removeprefix("error: ")) from None
        sys.exit(f"error: process {rank} ended with exit code {failure.exitcode}")
    finally:
        del os.environ[WORKER]
