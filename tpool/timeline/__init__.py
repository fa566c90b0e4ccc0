"""Who did what when: the tasks and transfers of a pool, as data, as a trace for Perfetto, and as a picture."""
