"""Recipes, whole experiments in YAML files: read, checked, run with each step's files used again, and told as a table.

    name: sea-truthfulqa            by default the name of the file
    description: ...
    variables:                      values that `--set name=value` replaces
      model: gpt2
      retain: {required: a text file, one passage a line}
    defaults:                       options of every step whose command has them
      model: ${model}
    steps:
      - collect: {data: halueval, out: store}          a command and its options, named as in `--config`
      - for: {energy: [0.99, 0.998]}                   every combination of these; or a list of mappings
        steps:
          - fit-sea: {store: store, positive_energy: "${energy}", out: "sea-${energy}"}

What a command writes lies in the folder of the run: options that are declared as outputs name files and folders there.
Where another option has the name of an earlier step's output, it means that output.
"""
