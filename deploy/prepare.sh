#!/bin/sh
# Before the first part starts: the folders, Dagster's settings, and Dagster's tables, which two parts that start at
# once would both make. Harmless to repeat: what stands is left as it is.
set -eu
umask 077
mkdir -p "$RENDER_PLATFORM_STATE_DIR" "$DAGSTER_HOME"
if [ ! -e "$DAGSTER_HOME/dagster.yaml" ]; then
  cp "$(dirname "$0")/dagster.yaml" "$DAGSTER_HOME/dagster.yaml.new"
  mv "$DAGSTER_HOME/dagster.yaml.new" "$DAGSTER_HOME/dagster.yaml"
fi
dagster instance info > /dev/null
