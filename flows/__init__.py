"""When things happen: flows that chain tasks, and the `qlora` command."""
