import random
import urllib.request

import pytest

WORDS = (
    "turn off the lamp please play wake me at seven how do you say good morning cold here buy milk and bread".split()
)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """A folder with a two-layer Llama of random weights and a byte-level BPE with ChatML control tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=6)) for _ in range(200)]
    special = ["<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny-teacher")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bucket():
    """The URL of a bucket on an S3 server of this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        # Ray's workers are as nice as this process, and not more.
        "RAY_worker_niceness": "0",
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir("shards")
        yield "s3://shards"
        # What the server holds is the process's, and outlives it.
        with urllib.request.urlopen(urllib.request.Request(settings["AWS_ENDPOINT_URL"] + "/moto-api/reset", b"")):
            pass
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def cluster(request, bucket):
    """Two workers. What a test module sends them they cannot import."""
    from attar.cluster.machines import start_cluster
    from attar.recipe.base import RunPart

    with start_cluster(RunPart(on="ray", workers=2, threads=1)) as started:
        # Not before, as it reads its settings at its import.
        import ray

        ray.cloudpickle.register_pickle_by_value(request.module)
        yield started
    assert not ray.is_initialized()
