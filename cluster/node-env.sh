# shellcheck shell=bash
# The environment of Ray, and of the jobs that it starts, on the nodes of aws.yaml, gcp.yaml and on-premises.yaml: sourced there.
# Nothing here is secret, and nothing secret belongs here: every process of the cluster inherits it.
export PATH="$HOME/raydiv-venv/bin:$PATH"
export RAY_AUTH_MODE=token  # the token itself is in ~/.ray/auth_token
export RAYDIV_CACHE=/shared/cache  # or s3://bucket/cache, gs://bucket/cache
export HF_HOME=/shared/huggingface
export HF_TOKEN_PATH="$HOME/.cache/huggingface/token"  # a token is not kept on storage that others read
# export MLFLOW_TRACKING_URI=https://mlflow.example.com
# Ray's launcher sets it to 1 for what it runs over SSH, and the workers that Ray starts would have one thread each
unset OMP_NUM_THREADS
