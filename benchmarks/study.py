"""Runs a study: rows x languages x split seeds x training seeds, one JSON a run, then statistics, tables and figures.

    python benchmarks/study.py benchmarks/studies/real.yaml --workers 2

Goes on where it was stopped. Runs are in benchmarks/results/study/<study>/; the ranks of every query and the heads of
teachers are in outputs/study/<study>/. `benchmarks/study_report.py` writes docs/study.md from the JSON alone.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import yaml

from modeling_nrccr.files import write_file


ROOT = Path(__file__).parent.parent


RESULTS, WORK = ROOT / "benchmarks/results/study", ROOT / "outputs/study"
FOLDERS = {"extends", "base", "teacher", "output_dir", "train_language", "baselines", "search_page"}
QUERIES = ("target", "translated", "fused", "english")


@dataclass
class Row:
    """A line of the table: what is trained, over the study's settings.

    Args:
        label: Its name in tables.
        recipe: A file of modeling_nrccr/recipes: its own settings come before the row's; the folders of models
            that it names are left to `start_from` and `teacher`.
        teacher, start_from: Rows whose model of the same split and seed teaches, or gives the first weights.
        new_text_side: From `start_from` the visual side alone is taken.
        adapter: Of the model alone this language's adapter is trained (`NrccrModel.add_language`).
        rival: Trained in its place: a function of examples/rivals.py.
        english_text_only: English captions stand where the target captions would, in training.
        learns_from: Languages, each with its translators, whose training captions stand where the target language's
            would, as many of each: transfer, or where the target language is one of them, several at once.
        one_to_k: All the captions of a picture come in one batch (CCRK), which then has so many pictures.
        trained_in: The only language that is trained in: in others the model of that run is asked.
        tuned_as: The row whose point of the grid is taken; the row's own settings win over it.
        conditions, seeds, languages: Its own, where they are fewer than the study's.
        listed: False keeps it out of tables: it serves other rows.
    """

    label: str
    settings: dict = field(default_factory=dict)
    recipe: str | None = None
    teacher: str | None = None
    start_from: str | None = None
    new_text_side: bool = False
    adapter: bool = False
    rival: str | None = None
    english_text_only: bool = False
    learns_from: dict[str, str] | None = None
    one_to_k: bool = False
    trained_in: str | None = None
    tuned_as: str | None = None
    conditions: list[str] | None = None
    seeds: list[int] | None = None
    languages: list[str] | None = None
    listed: bool = True


@dataclass(frozen=True)
class Run:
    condition: str
    language: str
    split_seed: int
    seed: int
    row: str
    point: int | None = None  # of the grid; None: the chosen one

    @property
    def name(self) -> str:
        parts = [self.condition, self.language, f"split{self.split_seed}", f"seed{self.seed}", self.row]
        return "-".join(part for part in parts if part) + ("" if self.point is None else f"-grid{self.point}")


class Study:
    """A YAML file of `benchmarks/studies/`. Raises ValueError for a key or a row that nobody knows. `consistency`:
    languages whose ranks of the same pictures are compared (`mean_rank_variance`)."""

    KEYS = {"config", "conditions", "languages", "split_seeds", "seeds", "settings", "grid", "rows", "comparisons"}
    OPTIONAL = {"consistency"}

    def __init__(self, path: Path):
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        if wrong := (set(loaded) - self.OPTIONAL) ^ self.KEYS:
            raise ValueError(f"{path}: keys missing or unknown: {', '.join(sorted(wrong))}")
        self.name = path.stem
        self.config, self.conditions, self.settings = loaded["config"], loaded["conditions"], loaded["settings"]
        self.languages, self.split_seeds, self.seeds = loaded["languages"], loaded["split_seeds"], loaded["seeds"]
        self.grid, self.comparisons = loaded["grid"], [tuple(pair) for pair in loaded["comparisons"]]
        self.consistency = loaded.get("consistency", [])
        known = {f.name for f in fields(Row)}
        for name, row in loaded["rows"].items():
            if unknown := set(row) - known:
                raise ValueError(f"{path}, row {name}: unknown keys {', '.join(sorted(unknown))}")
        self.rows = {name: Row(**row) for name, row in loaded["rows"].items()}
        for row in self.rows.values():
            if row.recipe:
                own = yaml.safe_load((ROOT / "modeling_nrccr/recipes" / row.recipe).read_text(encoding="utf-8"))
                row.settings = {key: value for key, value in own.items() if key not in FOLDERS} | row.settings
        named = {name for row in self.rows.values() for name in (row.teacher, row.start_from, row.tuned_as)} - {None}
        named |= {side.split(":")[0] for pair in self.comparisons for side in pair}
        if unknown := named - self.rows.keys():
            raise ValueError(f"{path}: rows that there are not: {', '.join(sorted(unknown))}")

    @property
    def results(self) -> Path:
        return RESULTS / self.name

    @property
    def work(self) -> Path:
        return WORK / self.name

    def grid_runs(self) -> Iterator[Run]:
        """Hyper-parameters are chosen once, for each row, at the first condition, language, split seed and seed."""
        for name, row in self.rows.items():
            if row.tuned_as is None:
                yield from self.grid_runs_of(name)

    def grid_runs_of(self, row: str) -> list[Run]:
        if len(self.grid) == 1:
            return []
        language = self.rows[row].trained_in or self.languages[0]
        first = (next(iter(self.conditions)), language, self.split_seeds[0], self.seeds[0])
        return [Run(*first, self.rows[row].tuned_as or row, point) for point in range(len(self.grid))]

    def runs(self) -> Iterator[Run]:
        for name, row in self.rows.items():
            seeds = self.seeds if row.seeds is None else row.seeds
            languages = self.languages if row.languages is None else row.languages
            conditions = self.conditions if row.conditions is None else row.conditions
            for place in itertools.product(conditions, languages, self.split_seeds, seeds):
                yield Run(*place, name)

    def path(self, run: Run) -> Path:
        return self.results / f"{run.name}.json"

    def load(self, run: Run) -> dict:
        return json.loads(self.path(run).read_text(encoding="utf-8"))

    def chosen(self, row: str) -> int:
        """The point of the grid with the best SumR on validation; its grid runs must be there."""
        runs = self.grid_runs_of(row)
        return max(range(len(runs)), key=lambda point: self.load(runs[point])["selection"], default=0)

    def run_settings(self, run: Run) -> dict:
        """What the run changes in the study's `config`; a value may be a mapping, by language."""
        row = self.rows[run.row]
        point = self.grid[self.chosen(run.row) if run.point is None else run.point]
        adapter = {"train_language": row.trained_in or run.language} if row.adapter else {}
        own = adapter | {"language": run.language, "split_seed": run.split_seed, "seed": run.seed}
        settings = self.settings | point | row.settings | self.conditions[run.condition] | own
        return {key: value[run.language] if isinstance(value, dict) else value for key, value in settings.items()}


class Runner:
    """Runs on one process: data sets, encoders and the cache of their outputs are loaded once."""

    def __init__(self, study: Study):
        self.study = study
        self.experiments, self.encoders = {}, None

    def ensure(self, run: Run, blocking: bool = True) -> bool:
        """The run's JSON is there afterwards; False where another process is at it and `blocking` is False."""
        from filelock import FileLock, Timeout

        path = self.study.path(run)
        lock = self.study.work / "locks" / f"{run.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=-1 if blocking else 0):
                settings = self.study.run_settings(run)
                if path.exists():
                    stored = self.study.load(run)
                    if stored["settings"] != json.loads(json.dumps(settings)):
                        raise ValueError(f"{path} has other settings than the study: delete it to run it again")
                    if not self.is_teacher(run) or self.heads(run).exists():
                        return True
                report = self.run(run, settings)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
                print(f"{run.name}: SumR {report['test']['target']['all']['sum_recall']:.1f}, {report['seconds']} s")
        except Timeout:
            return False
        return True

    def is_teacher(self, run: Run) -> bool:
        rows = self.study.rows.values()
        asked_elsewhere = self.study.rows[run.row].trained_in == run.language
        return run.point is None and (asked_elsewhere or any(run.row in (row.teacher, row.start_from) for row in rows))

    def heads(self, run: Run) -> Path:
        return self.study.work / "heads" / f"{run.name}.safetensors"

    def experiment(self, arguments: tuple):
        """One a data set, reused by rows; its model and arguments are the row's."""
        from modeling_nrccr.training.experiment import Experiment

        script, model, args = arguments
        key = tuple(sorted(asdict(script).items(), key=str))
        if key not in self.experiments:
            self.experiments[key] = Experiment(script, model, args)
        experiment = self.experiments[key]
        experiment.model, experiment.args, experiment.encoders = model, args, self.encoders
        return experiment

    def run(self, run: Run, settings: dict) -> dict:
        import torch
        import transformers
        from safetensors.torch import load_file, save_file

        from modeling_nrccr.training.run import parse_arguments

        start, row = time.perf_counter(), self.study.rows[run.row]
        fixed = {
            "feature_cache_dir": str(WORK / "features"),
            "output_dir": str(self.study.work / "trainer"),
            "search_page": "none",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "keep_best_in_memory": True,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "use_cpu": not torch.accelerator.is_available(),
        }
        experiment = self.experiment(parse_arguments(["--recipe", str(ROOT / self.study.config)], **settings | fixed))
        args = experiment.args
        teacher = None
        if row.teacher:
            teacher = self.trained(experiment, run, row.teacher)
        rows = {split: part.to_list() for split, part in experiment.rows.items()}  # read often: no Arrow in between
        trained_here = row.trained_in in (None, run.language)
        validation = rows["validation"]
        if row.learns_from and trained_here:
            rows["train"], validation = self.rows_of_languages(row, run, settings | fixed, validation)
        elif row.adapter:
            rows["train"] = rows["train"] + experiment.lexicon
        if row.adapter and row.rival is None and trained_here:
            # before there is a trainer: other arguments reset accelerate's state
            rows["train"] = self.taught(experiment, run, row.start_from, rows["train"])
        trainer = experiment.trainer(args, teacher=teacher)
        self.encoders = experiment.encoders
        if row.start_from or not trained_here:
            weights = load_file(self.needed(run, row.start_from if trained_here else run.row))
            weights = {k: v for k, v in weights.items() if not (row.new_text_side and k.startswith("text_"))}
            trainer.model.load_state_dict(weights, strict=False)
        if row.learns_from and trained_here:
            for part in (rows["train"], validation):
                trainer.data_collator.processor.add_texts(caption["target_caption"] for caption in part)
        if row.english_text_only:
            rows["train"] = [row | {"target_caption": row["source_caption"]} for row in rows["train"]]
        trainer.train_dataset, trainer.eval_dataset = rows["train"], validation
        if row.one_to_k:
            groups = defaultdict(list)
            for caption in rows["train"]:
                groups[caption["image_id"]].append(caption)
            trainer.train_dataset = list(groups.values())
        loaded = time.perf_counter()
        if row.rival:
            self.train_rival(row.rival, trainer, rows)
        elif trained_here:
            trainer.train()
        trained = time.perf_counter()
        if self.is_teacher(run):
            weights = trainer.model.state_dict()
            lora = trainer.model.language_keys(args.train_language) if args.train_language else ()
            frozen = ("text_tower.", "visual_tower.")
            weights = {k: v.contiguous() for k, v in weights.items() if k in lora or not k.startswith(frozen)}
            self.heads(run).parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, self.heads(run).with_suffix(".tmp"))
            os.replace(self.heads(run).with_suffix(".tmp"), self.heads(run))
        from benchmarks.study_evaluation import evaluate

        answers = None if args.distillation_relation == "source" else teacher  # who saw no picture finds none
        results, ranks, weight = evaluate(trainer, answers, rows)
        if run.point is None:
            path = self.study.work / "ranks" / f"{run.name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            ranks.to_parquet(path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        watched = "english" if args.eval_query_column == "reference_source_caption" else "target"
        return {
            **asdict(run),
            "label": row.label,
            "settings": settings,
            "grid_point": self.study.chosen(run.row) if run.point is None else run.point,
            "selection": results["validation"][watched]["all"]["sum_recall"],
            "source_query_weight": weight,
            **results,
            "steps": trainer.state.global_step,
            "seconds": {
                "data and encoders": round(loaded - start, 1),
                "training": round(trained - loaded, 1),
                "evaluation": round(time.perf_counter() - trained, 1),
            },
            "threads": torch.get_num_threads(),
            "translator": experiment.translator.name,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "commit": commit(),
        }

    def train_rival(self, name: str, trainer, rows: dict[str, list[dict]]):
        """Puts the rival's model, and the cache of its encoder, in the place of the trainer's."""
        from modeling_nrccr.training import baselines as rivals

        model, cache, args = trainer.model, trainer.data_collator.processor, trainer.args
        if name == "embed_distillation":
            rivals.embed_distillation(model, args.train_language, cache, rows["train"], args)
            return
        trainer.model = rivals.trunk_calibration(model, cache.processor, rows["train"], args)
        trainer.model.set_trained_layers(0, False)
        own = rivals.frozen_cache(trainer.model, cache.processor, rows["validation"] + rows["test"])
        own.images = cache.images
        trainer.data_collator.processor = own

    def rows_of_languages(self, row: Row, run: Run, settings: dict, validation: list[dict]):
        """Training captions (and words) in the languages of `row.learns_from`, by their translators, as many of each;
        and captions to choose by: of these languages where the run's is one of them, else its own."""
        from modeling_nrccr.data.load import balance
        from modeling_nrccr.training.run import parse_arguments

        train, held_out = [], []
        for language, translator in row.learns_from.items():
            of_language = settings | {"language": language, "translator": translator}
            experiment = self.experiment(parse_arguments(["--recipe", str(ROOT / self.study.config)], **of_language))
            train.append(experiment.rows["train"].to_list() + experiment.lexicon)
            held_out += experiment.rows["validation"].to_list()
        return balance(train, run.seed), held_out if run.language in row.learns_from else validation

    def taught(self, experiment, run: Run, base: str, rows: list[dict]) -> list[dict]:
        """Rows with the base's embeddings of their source captions, which no step then computes again."""
        from modeling_nrccr.training.experiment import build_model
        from modeling_nrccr.training.teacher import add_teacher_embeds as teach

        model = self.trained(experiment, run, base)
        cache = experiment.cached(model, build_model(experiment.model, experiment.encoders)[1])
        cache.add_texts(row["source_caption"] for row in rows)
        return teach([dict(row) for row in rows], model, cache)

    def needed(self, run: Run, row: str) -> Path:
        """The weights of another row's run of the same split and seed."""
        needed = replace(run, row=row, point=None, language=self.study.rows[row].trained_in or run.language)
        for other in (*self.study.grid_runs_of(row), needed):
            self.ensure(other)
        return self.heads(needed)

    def trained(self, experiment, run: Run, row: str):
        """The model of another row's run, for use as a teacher."""
        from safetensors.torch import load_file

        from modeling_nrccr.training.run import parse_arguments

        path = self.needed(run, row)
        settings = self.study.run_settings(replace(run, row=row, point=None))
        model = parse_arguments(["--recipe", str(ROOT / self.study.config)], **settings)[1]
        own, experiment.model = experiment.model, model
        teacher, _ = experiment.build(experiment.args)
        experiment.model, self.encoders = own, experiment.encoders
        teacher.load_state_dict(load_file(path), strict=False)
        return teacher.eval()


def commit() -> str:
    """The commit that ran; "+" where tracked files had changed since."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return head[:12] + ("+" if dirty else "")


def work(study: Study):
    """Every run that is wanting, in the order of the file; what another process is at comes later."""
    runner = Runner(study)
    for phase in (study.grid_runs, study.runs):
        pending = list(phase())
        while pending:
            waiting = [run for run in pending if not runner.ensure(run, blocking=False)]
            if len(waiting) == len(pending):
                time.sleep(1)
            pending = waiting


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="a YAML file of benchmarks/studies")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the runs, and the cores")
    args = parser.parse_args()
    study = Study(args.study)
    if args.workers > 1:
        environ = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.workers))}
        command = [sys.executable, __file__, str(args.study)]
        workers = [subprocess.Popen(command, env=environ | {"NRCCR_STUDY_WORKER": "1"}) for _ in range(args.workers)]
        try:
            if any([worker.wait() for worker in workers]):
                sys.exit("a worker failed: see above; what was run stays")
        finally:
            for worker in workers:
                worker.terminate()
    else:
        work(study)
    if "NRCCR_STUDY_WORKER" not in os.environ:
        from benchmarks.study_statistics import compare

        compare(study)


if __name__ == "__main__":
    main()
