"""One builder a dataset: `datasets.GeneratorBasedBuilder` classes that are used directly; a builder never trains."""
