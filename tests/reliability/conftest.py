"""What is compiled is kept for the runs that follow: most are of a few configurations."""

import jax
import pytest

OPTIONS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="package", autouse=True)
def compilation_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("compiled"))
    options = OPTIONS | {"jax_compilation_cache_dir": folder}
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in options.items():
            jax.config.update(name, value)
            monkeypatch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)
