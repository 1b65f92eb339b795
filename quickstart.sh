#!/usr/bin/env bash
# From nothing to a steered language model: installs what is needed, fetches a small real model and
# real text, runs every stage, and writes a page to look at. Run it again to reuse what is there.
#
#   bash quickstart.sh            about five minutes on two CPU cores
#   bash quickstart.sh --short    fewer sentences, for a first look or a test
set -euo pipefail
cd "$(dirname "$0")"

run=runs/quickstart sentences=19000 latents=4096 epochs=3 evaluated=150
case "${1:-}" in
    "") ;;
    --short) run=runs/quickstart/short sentences=1500 latents=2048 epochs=4 evaluated=60 ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 1 ;;
esac
started=$SECONDS
step() { printf '\n[%d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }

step "environment"
. ./environment.sh
mkdir -p "$run"

step "a small Llama-architecture model and English sentences"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
model=runs/quickstart/model dataset=runs/quickstart/sentences
python -m embedded.model --output_dir $model &
python -m embedded.text --output_dir $dataset
wait $!

step "1 capture_activations.py: run the model, keep one layer's activations"
python capture_activations.py --model_dir $model --dataset_dir $dataset \
    --output_dir $run/activation_outputs --num_samples $sentences --layers 13

step "2 sae_preprocessing.py: shuffle them into training rows"
python sae_preprocessing.py --input_dir $run/activation_outputs --num_processes 2 --batch_size 1024

step "3 sae_training.py: train the sparse autoencoder"
python sae_training.py --data_dir $run/activation_outputs_batched \
    --b_pre_path $run/activation_outputs_mean.pt --model_save_path $run/trained_sae.pt \
    --n_latents $latents --k 32 --num_epochs $epochs --keep_last_n 0

step "4 sae_evaluation.py: how faithful it is on sentences it never saw"
python sae_evaluation.py --model_dir $model --sae_model_path $run/trained_sae.pt \
    --dataset_dir $dataset --num_samples $evaluated

step "5 capture_top_activating_sentences.py: what every latent fires on"
python capture_top_activating_sentences.py --data_dir $run/activation_outputs \
    --model_path $run/trained_sae.pt --model_dir $model \
    --captured_data_output_dir $run/top_activating_sentences

tops=$run/top_activating_sentences
ids=$tops/response_ids.yaml labels=$run/output/parsed_responses.yaml
send=".venv/bin/python interpret_top_sentences_send_batches.py --top_sentences_dict_filepath $tops/top_sentences_mean.yaml --response_ids_filepath $ids --dataset_dir $dataset --max_latents 100 --max_cost_usd 1"
retrieve=".venv/bin/python interpret_top_sentences_retrieve_batches.py --response_ids_filepath $ids --response_output_dir $run/output --wait"
parse=".venv/bin/python interpret_top_sentences_parse_responses.py --response_ids_filepath $ids --retrieved_responses_dir $run/output --parsed_responses_output_filepath $labels --overwrite"
if [ -n "${ANTHROPIC_API_KEY:-}" ]; then
    step "6 interpret_top_sentences_*.py: Claude names 100 latents (at most 1 dollar)"
    $send
    $retrieve
    $parse
else
    step "6 no ANTHROPIC_API_KEY: latents are labelled by their top tokens; for Claude's labels, later:"
    printf '    %s\n' "$send" "$retrieve" "$parse"
    python interpret_top_sentences_parse_responses.py --from_top_tokens \
        --evidence_path $tops/evidence.parquet --parsed_responses_output_filepath $labels
fi

python latent_browser.py --evidence_path $tops/evidence.parquet --labels_path $labels \
    --sae_model_path $run/trained_sae.pt --html $run/latents.html &
browser=$!

step "7 words of the text turned up: which of them show in what the model writes"
python -m saint.steering.showcase --llama_model_dir $model --sae_model_path $run/trained_sae.pt \
    --families benchmarks/data/concept_families.json
wait $browser

step "8 a page to look at"
python -m embedded.page --run_dir $run --llama_model_dir $model

step "done. Everything is in $run"
echo "steer in a browser: .venv/bin/python llama_3_inference_text_completion_gradio.py \\"
echo "    --llama_model_dir $model --sae_model_path $run/trained_sae.pt --port 8080"
echo "browse all latents: $run/latents.html"
echo "look at: $(.venv/bin/python -c 'import pathlib, sys; print(pathlib.Path(sys.argv[1]).resolve().as_uri())' $run/quickstart.html)"
