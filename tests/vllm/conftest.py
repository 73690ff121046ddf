"""vLLM's settings for tests: one process, one thread, no compilation, and its cache in a temporary folder."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def vllm_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Set the environment variables of vLLM before it is imported, and return them. Other processes get them, too."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm")), "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    patch = pytest.MonkeyPatch()
    for name, value in settings.items():
        patch.setenv(name, value)
    return settings
