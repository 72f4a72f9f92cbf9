"""Choose the configuration of a call that names none."""

from impls.configs import ChunkTritonConfig, RecurrentTritonConfig


def default_chunk(K, V, dtype, target, chunk_size=None):
    return ChunkTritonConfig() if chunk_size is None else ChunkTritonConfig(chunk_size=chunk_size)


def default_recurrent(K, V, dtype, target):
    return RecurrentTritonConfig()
