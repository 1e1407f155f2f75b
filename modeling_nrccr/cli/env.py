"""Print versions, extras and devices, for a bug report.

    nrccr env
    nrccr env --json

Of environment variables the names alone are shown: a value may be a token or the address of a private server.
"""

import json

from .common import command, parser


@command()
def main(argv: list[str] | None = None):
    options = parser("env", *__doc__.split("\n\n", 1))
    options.add_argument("--json", action="store_true", help="as JSON")
    given = options.parse_args(argv)

    from ..loading.environment import describe_environment

    found = describe_environment()
    if given.json:
        print(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        lines = value if isinstance(value, list) else [value]
        print(f"{name:<{width}}  {', '.join(map(str, lines)) or 'none'}")
