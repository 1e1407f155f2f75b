"""Runs the runs of a study in one process: data sets, encoders and the cache of their outputs are loaded once."""

import json
import os
import subprocess
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import ROOT, records
from benchmarks.study.spec import KEY, WORK, Row, Run, Study


FEATURES = WORK / "features"  # what frozen encoders give, whoever asks


class Runner:
    """Runs on one process: data sets, encoders and the cache of their outputs are loaded once."""

    def __init__(self, study: Study):
        self.study = study
        self.experiments, self.encoders = {}, None

    def ensure(self, run: Run, blocking: bool = True) -> bool:
        """Run it unless its line is there already. Return False where another process is at it and `blocking` is
        False."""
        from filelock import FileLock, Timeout

        lock = self.study.work / "locks" / f"{run.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=-1 if blocking else 0):
                settings = self.study.run_settings(run)
                if stored := self.study.find(run):
                    if stored["settings"] != json.loads(json.dumps(settings)):
                        where = f"{self.study.file}, {run.name}"
                        raise ValueError(f"{where}: other settings than the study's; delete the line to run it again")
                    if not self.is_teacher(run) or self.heads(run).exists():
                        return True
                report = self.run(run, settings)
                records.put(self.study.file, report, KEY)
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
        """Return the one experiment of a data set, reused by rows, with the row's model and arguments."""
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
            "feature_cache_dir": str(FEATURES),
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
        from benchmarks.study.evaluation import evaluate

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
        """Return training captions (and words) in the languages of `row.learns_from`, by their translators, as many of
        each; and captions to choose by: of these languages where the run's is one of them, else its own."""
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
        """Return rows with the base's embeddings of their source captions, which no step then computes again."""
        from modeling_nrccr.training.experiment import build_model
        from modeling_nrccr.training.teacher import add_teacher_embeds as teach

        model = self.trained(experiment, run, base)
        cache = experiment.cached(model, build_model(experiment.model, experiment.encoders)[1])
        cache.add_texts(row["source_caption"] for row in rows)
        return teach([dict(row) for row in rows], model, cache)

    def needed(self, run: Run, row: str) -> Path:
        """Return the weights of another row's run, which is run first if need be, of the same split and seed."""
        needed = replace(run, row=row, point=None, language=self.study.rows[row].trained_in or run.language)
        for other in (*self.study.grid_runs_of(row), needed):
            self.ensure(other)
        return self.heads(needed)

    def trained(self, experiment, run: Run, row: str):
        """Return the model of another row's run, for use as a teacher."""
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
    """Return the commit that ran; "+" where tracked files had changed since."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return head[:12] + ("+" if dirty else "")


def work(study: Study):
    """Run every run that is wanting, in the order of the file; what another process is at comes later."""
    runner = Runner(study)
    for phase in (study.grid_runs, study.runs):
        pending = list(phase())
        while pending:
            waiting = [run for run in pending if not runner.ensure(run, blocking=False)]
            if len(waiting) == len(pending):
                time.sleep(1)
            pending = waiting
