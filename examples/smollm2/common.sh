# What the scripts of this folder share: the interpreter, the data, and whether it is there.
python=${PYTHON:-.venv/bin/python}
data=${SHINE_DATA:-data}

need() {  # need FOLDER...: end with the remedy where one of the data is missing
    for folder; do
        if [ ! -d "$data/$folder" ]; then
            name=${folder%%/*}
            echo "error: there is no $data/$folder: sh scripts/download_data.sh ${name%%_*}, or set SHINE_DATA" >&2
            exit 2
        fi
    done
}
