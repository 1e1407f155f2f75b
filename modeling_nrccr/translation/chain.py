"""Several engines in a row, by way of other languages."""

from collections.abc import Sequence

from .base import Translator


class ChainTranslator(Translator):
    """
    Translation by way of other languages: `ChainTranslator([a, b], ["es"])` translates en-gl as en-es by `a`, then
    es-gl by `b`, and gl-en the same way back: gl-es by `b`, then es-en by `a`.

    Args:
        engines (`list` of [`Translator`]): two or more; one may stand there twice.
        pivots (`list` of `str`): the languages between them, one less.
    """

    def __init__(self, engines: Sequence[Translator], pivots: Sequence[str]):
        if len(engines) < 2 or len(pivots) != len(engines) - 1:
            raise ValueError(f"{len(engines)} engines and {len(pivots)} languages: n engines have n - 1 between them")
        self.engines, self.pivots = list(engines), list(pivots)
        self.name = engines[0].name + "".join(f"+{code}+{engine.name}" for code, engine in zip(pivots, engines[1:]))

    @property
    def version(self) -> str:
        return " | ".join(engine.version for engine in self.engines)

    def supported_pairs(self) -> list[tuple[str, str]]:
        found = set()
        for engines, pivots in ((self.engines, self.pivots), (self.engines[::-1], self.pivots[::-1])):
            if all(
                tuple(pair) in engine.supported_pairs() for engine, *pair in zip(engines[1:-1], pivots, pivots[1:])
            ):
                sources = {a for a, b in engines[0].supported_pairs() if b == pivots[0]}
                targets = {b for a, b in engines[-1].supported_pairs() if a == pivots[-1]}
                found |= {(a, b) for a in sources for b in targets if a != b}
        return sorted(found)

    def _stages(self, source: str, target: str) -> list[tuple[Translator, str, str]]:
        """Return each engine and its pair, in the order of the engines or, where that is the way, in the other."""
        problems = []
        for engines, pivots in ((self.engines, self.pivots), (self.engines[::-1], self.pivots[::-1])):
            codes = [source, *pivots, target]
            try:
                return [(engine, *engine.check_pair(a, b)) for engine, a, b in zip(engines, codes, codes[1:])]
            except ValueError as error:
                problems.append(str(error))
        raise ValueError(f"{self.name} cannot translate {source}-{target}: {problems[0]}; nor the other way round")

    def check_pair(self, source: str, target: str) -> tuple[str, str]:
        stages = self._stages(source, target)
        return stages[0][1], stages[-1][2]

    def _translate(self, texts: list[str], source: str, target: str) -> list[str]:
        for engine, a, b in self._stages(source, target):
            texts = engine.translate(texts, a, b, show_progress=False)
        return texts
