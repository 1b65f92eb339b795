"""Imported by the fork server: what the client would otherwise import at its first request."""

import gc
import importlib
import os
import ssl

import pyarrow as pa

from saint.interpretation.client import open_client

for stage in (
    "capture_activations",
    "sae_preprocessing",
    "sae_training",
    "sae_evaluation",
    "capture_top_activating_sentences",
    "interpret_top_sentences_send_batches",
    "interpret_top_sentences_retrieve_batches",
    "interpret_top_sentences_parse_responses",
    "llama_3_inference_text_completion",
):
    importlib.import_module(stage)

pa.array([0])  # imports pandas

# The tests' server speaks plain HTTP: reading all root certificates would take most of a run.
ssl.SSLContext.load_verify_locations = lambda *args, **kwargs: None  # type: ignore[method-assign]

os.environ["ANTHROPIC_API_KEY"] = "warm-up"
client = open_client(60)
resources = (client.messages.batches, client.messages.create)
try:
    client.copy(base_url="http://127.0.0.1:9", max_retries=0).messages.batches.retrieve("none")
except Exception as error:  # nobody listens there: it is the imports that are wanted
    refused = error
# Children share these objects' memory as long as their garbage collector leaves them alone.
gc.collect()
gc.freeze()
