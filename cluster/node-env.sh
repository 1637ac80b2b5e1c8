# shellcheck shell=bash
# The environment of Ray and its jobs on the nodes of aws.yaml, gcp.yaml and on-premises.yaml, which source this file.
# No secret belongs here: every process of the cluster inherits these variables.
export PATH="$HOME/raydiv-venv/bin:$PATH"
export RAY_AUTH_MODE=token  # the token itself is in ~/.ray/auth_token
export RAYDIV_CACHE=/shared/cache  # or s3://bucket/cache, gs://bucket/cache
export HF_HOME=/shared/huggingface
export HF_TOKEN_PATH="$HOME/.cache/huggingface/token"  # not on shared storage, which others can read
# export MLFLOW_TRACKING_URI=https://mlflow.example.com
# Ray's launcher sets it to 1 for commands over SSH, and the workers would have one thread each
unset OMP_NUM_THREADS
