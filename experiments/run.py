"""From flags to results: what every data set's program does."""

import os

from absl import flags

from experiments import dataset_summary, recipe, results, timing
from experiments import flags as flags_lib
from experiments.config import Config
from experiments.pipeline import Pipeline
from experiments.workdir import RunFiles, Workdir, write_json
from instanas_jax import data, parallel


def main(defaults: Config) -> None:
    """Defines the flags with these defaults and runs the experiment that they describe."""
    flags_lib.define(defaults)
    flags_lib.start(lambda: _run(defaults.dataset), resumes=True)


def _run(dataset_name: str) -> None:
    config = flags_lib.read(dataset_name)
    flags_lib.join_processes()
    dataset = data.load(
        dataset_name,
        data_dir=config.data.data_dir or None,
        validation_size=config.data.validation_size,
        train_limit=config.data.train_limit or None,
        test_limit=config.data.test_limit or None,
        image_size=config.model.image_size,
        workers=config.data.data_workers,
    )
    recipe.check_data(config, dataset)

    table_path, foreign = flags.FLAGS.latency_table or None, flags.FLAGS.allow_foreign_table

    def open_workdir() -> Workdir:
        # `Path.exists` raises where a name is too long, which `Workdir` tells.
        begins = not os.path.exists(RunFiles(flags.FLAGS.workdir or "").latency_table)
        if table_path and begins:  # A table that does not fit claims no folder.
            spec = config.model.spec(num_classes=dataset.num_classes)
            timing.given_table(config.run, spec, table_path, allow_foreign=foreign)
        workdir = Workdir(
            flags.FLAGS.workdir or "",
            config=config,
            flags_text=flags_lib.as_flagfile(),
        )
        dataset_summary.keep(dataset, workdir.dataset)
        return workdir

    workdir = parallel.from_first(open_workdir)
    if parallel.from_first(workdir.results.exists):
        if parallel.is_first():
            table = results.read_table(workdir.results)
            print(f"{workdir.results} is complete; the run's table again:\n{table}")
        return
    pipeline = Pipeline(
        config,
        dataset=dataset,
        workdir=workdir,
        table_path=table_path,
        allow_foreign_table=foreign,
    )
    report = pipeline.run()
    if parallel.is_first():
        write_json(workdir.results, report)
        print(results.format_table(report))
        print(f"\nwritten to {workdir.results}")
