"""The flags of AscendSpeed 2023: of its README, of its 33 scripts, and of what its programs define.

By the command that does today what the program did. Commit 6801afd1 of 27 October 2023.
"""

README = {
    "asd-core pretrain": """
        --tensor-model-parallel-size --pipeline-model-parallel-size --num-layers-per-virtual-pipeline-stage
        --optimized-pipeline --manual-mbs --fold-mode --checkpoint-activations --checkpoint-policy
        --sequence-parallel --use-distributed-optimizer --triangle-attn --optimizer --mlp-layer-fusion
        --data-path --load --fp16
    """.split(),
    "asd-core finetune": """
        --is-instruction-dataset --lora-alpha --lora-load --lora-modules-to-save --lora-r
        --lora-register-forward-hook --lora-target-modules --data-path --load
    """.split(),
    "asd-data preprocess": """
        --input --output-prefix --tokenizer-type --tokenizer-name-or-path --tokenizer-not-use-fast
        --handler-name --json-key --workers --dataset-impl --hf-datasets-params --streaming --seq-length
    """.split(),
    "asd-ckpt convert": """
        --input-model-dir --output-model-dir --tensor-model-parallel-size --pipeline-model-parallel-size
        --type
    """.split(),
    "asd-eval run": """
        --task-data-path --task --seq-length --max-new-tokens --max-new-token --max-position-embeddings
        --tensor-model-parallel-size --pipeline-model-parallel-size --num-layers --hidden-size
        --ffn-hidden-size --load --num-attention-heads --tokenizer-type --tokenizer-name-or-path
        --tokenizer-not-use-fast --fp16 --micro-batch-size --seed
    """.split(),
}
"""Flags that the README names."""

SCRIPTS = {
    "asd-ckpt convert": """
        --deepspeed --input-model-dir --output-model-dir --partition-layers --pipeline-model-parallel-size
        --tensor-model-parallel-size --type
    """.split(),
    "asd-core finetune": """
        --DDP-impl --checkpoint-activations --checkpoint_block_layer --checkpoint_policy --clip-grad
        --data-impl --data-path --deepspeed --deepspeed-activation-checkpointing --deepspeed_config
        --distributed-backend --eval-interval --eval-iters --ffn-hidden-size --fp16 --global-batch-size
        --hidden-size --initial-loss-scale --is-instruction-dataset --load --log-interval --lora-alpha
        --lora-load --lora-modules-to-save --lora-r --lora-target-modules --lr --lr-decay-iters
        --lr-decay-style --lr-warmup-fraction --lr-warmup-iters --master_addr --master_port
        --max-position-embeddings --merge-file --micro-batch-size --min-lr --nnodes
        --no-contiguous-buffers-in-local-ddp --no-pipeline-parallel --node_rank --nproc_per_node
        --num-attention-heads --num-layers --pipeline-model-parallel-size --save --save-interval --seed
        --seq-length --split --tensor-model-parallel-size --tokenizer-name-or-path --tokenizer-not-use-fast
        --tokenizer-type --train-iters --use-cpu-initialization --vocab-file --weight-decay --zero-stage
    """.split(),
    "asd-core pretrain": """
        --DDP-impl --adam-beta1 --adam-beta2 --adam-eps --attention-dropout --bf16 --checkpoint-activations
        --checkpoint-policy --checkpoint_block_layer --checkpoint_policy --clip-grad --data-impl --data-path
        --deepspeed --deepspeed-activation-checkpointing --deepspeed_config --distributed-backend
        --embed-layernorm --eval-interval --eval-iters --ffn-hidden-size --foldx-mode --fp16
        --global-batch-size --hidden-dropout --hidden-size --init-method-std --initial-loss-scale --load
        --log-batch-size-to-tensorboard --log-interval --log-timers-to-tensorboard
        --log-validation-ppl-to-tensorboard --lr --lr-decay-iters --lr-decay-samples --lr-decay-style
        --lr-warmup-fraction --lr-warmup-iters --lr-warmup-samples --make-vocab-size-divisible-by
        --manual-layers --master_addr --master_port --max-position-embeddings --max_restarts --merge-file
        --micro-batch-size --min-lr --mlp-layer-fusion --nnodes --no-pipeline-parallel --node_rank
        --nproc_per_node --num-attention-heads --num-layers --optimizer --pad-vocab-size-to
        --pipeline-model-parallel-size --position-embedding-type --rampup-batch-size --rdzv_backend
        --rdzv_endpoint --recomputation-layer-num --save --save-interval --seed --seq-length
        --sequence-parallel --split --tee --tensor-model-parallel-size --tensorboard-dir
        --tensorboard-queue-size --tokenizer-name-or-path --tokenizer-not-use-fast --tokenizer-type
        --train-iters --train-samples --triangle-attn --use-cpu-initialization --use-distributed-optimizer
        --use-fused-rotary-pos-emb --use-manual-layer-allocation --vocab-file --weight-decay --zero-stage
    """.split(),
    "asd-eval run": """
        --ffn-hidden-size --fp16 --hidden-size --layernorm-epsilon --load --log-interval --master_addr
        --master_port --max-new-tokens --max-position-embeddings --micro-batch-size --nnodes --no-load-optim
        --no-load-rng --node_rank --nproc_per_node --num-attention-heads --num-layers
        --pipeline-model-parallel-size --seed --seq-length --task --task-data-path
        --tensor-model-parallel-size --tokenizer-name-or-path --tokenizer-not-use-fast --tokenizer-type
        --valid-data
    """.split(),
    "asd-infer generate": """
        --attention-dropout --deepspeed --deepspeed_config --embed-layernorm --ffn-hidden-size --fp16
        --hidden-dropout --hidden-size --init-method-std --layernorm-epsilon --load --lora-alpha --lora-load
        --lora-r --lora-target-modules --master_addr --master_port --max-new-tokens --max-position-embeddings
        --micro-batch-size --nnodes --no-contiguous-buffers-in-local-ddp --no-load-optim --no-load-rng
        --no-pipeline-parallel --node_rank --nproc_per_node --num-attention-heads --num-layers --num_gpus
        --num_nodes --pipeline-model-parallel-size --position-embedding-type --seed --seq-length
        --tensor-model-parallel-size --tokenizer-name-or-path --tokenizer-not-use-fast --tokenizer-type
    """.split(),
}
"""Flags in the shell scripts of `examples`, `tasks`, `tests` and `tools`, those of the launcher included."""

PROGRAMS = {
    "asd-core finetune": """
        --DDP-impl --accumulate-allreduce-grads-in-fp32 --adam-beta1 --adam-beta2 --adam-eps --adlr-autoresume
        --adlr-autoresume-interval --aml-data-download-path --apply-residual-connection-post-layernorm
        --attention-dropout --attention-softmax-in-fp32 --batch-size --bert-load --bert-no-binary-head --bf16
        --biencoder-projection-dim --biencoder-shared-query-context-model --block-data-path
        --checkpoint-activations --checkpoint-in-cpu --checkpoint-num-layers --checkpoint_block_layer
        --checkpoint_policy --clip-grad --contigious-checkpointing --cpu-optimizer --cpu_torch_adam
        --create-moe-param-group --data-efficiency-curriculum-learning --data-impl --data-path
        --dataloader-type --decoder-seq-length --deepspeed-activation-checkpointing
        --disable-moe-token-dropping --distribute-checkpointed-activations --distributed-backend
        --ds-inference --embed-layernorm --embedding-path --enable-expert-tensor-parallelism
        --encoder-seq-length --eod-mask-loss --eval-interval --eval-iters --evidence-data-path
        --exit-duration-in-mins --exit-interval --expert-interval --ffn-hidden-size --finetune --foldx-mode
        --fp16 --fp16-lm-cross-entropy --fp32-residual-connection --global-batch-size --group-query-attention
        --hidden-dropout --hidden-size --hidden-size-teacher --hysteresis --ict-head-size --ict-load --img-dim
        --indexer-batch-size --indexer-log-interval --inference --init-method-std --init-method-xavier-uniform
        --initial-loss-scale --is-instruction-dataset --kd --kd-alpha-ce --kd-beta-ce --kd-temp --kv-channels
        --layernorm-epsilon --lazy-mpu-init --load --load-teacher --local-rank --local_rank
        --log-batch-size-to-tensorboard --log-interval --log-num-zeros-in-grad
        --log-optimizer-states-to-tensorboard --log-params-norm --log-timers-to-tensorboard
        --log-validation-ppl-to-tensorboard --lora-adapter-name --lora-alpha --lora-load
        --lora-modules-to-save --lora-r --lora-register-forward-hook --lora-target-modules
        --loss-on-targets-only --loss-scale --loss-scale-window --lr --lr-decay-iters --lr-decay-samples
        --lr-decay-style --lr-decay-tokens --lr-warmup-fraction --lr-warmup-iters --lr-warmup-samples
        --lr-warmup-tokens --make-vocab-size-divisible-by --manual-layers --manual-mbs --mask-prob
        --max-position-embeddings --memory-centric-tiled-linear --merge-file --micro-batch-size
        --min-loss-scale --min-lr --mlp-layer-fusion --mlp-type --mmap-warmup --model-parallel-size
        --moe-eval-capacity-factor --moe-expert-parallel-size --moe-loss-coeff --moe-min-capacity
        --moe-train-capacity-factor --mos --no-async-tensor-model-parallel-allreduce
        --no-barrier-with-level-1-timing --no-bias-dropout-fusion --no-bias-gelu-fusion
        --no-contiguous-buffers-in-local-ddp --no-gradient-accumulation-fusion --no-load-lr-state
        --no-load-optim --no-load-rng --no-log-learnig-rate-to-tensorboard --no-log-loss-scale-to-tensorboard
        --no-masked-softmax-fusion --no-pipeline-parallel --no-query-key-layer-scaling --no-save-optim
        --no-save-rng --no-scatter-gather-tensors-in-pipeline --num-attention-heads
        --num-attention-heads-teacher --num-channels --num-classes --num-experts --num-experts-teacher
        --num-layers --num-layers-per-virtual-pipeline-stage --num-layers-teacher --num-query-groups
        --num-workers --onnx-safe --openai-gelu --optimized-pipeline --optimizer --override-lr-scheduler
        --pad-vocab-size-to --partition-activations --patch-dim --pipeline-model-parallel-size
        --pipeline-model-parallel-split-rank --position-embedding-type --profile-backward
        --query-in-block-prob --rampup-batch-size --random-ltd --recomputation-layer-num --remote-device
        --reset-attention-mask --reset-iteration --reset-position-ids --retriever-report-topk-accuracies
        --retriever-score-scaling --retriever-seq-length --return-data-index --sample-rate --save
        --save-interval --scattered-embeddings --seed --seq-length --sequence-parallel --sgd-momentum
        --short-seq-prob --split --split-transformers --synchronize-each-layer --tensor-model-parallel-size
        --tensorboard-dir --tensorboard-log-interval --tensorboard-queue-size --test-weighted-split-paths
        --test-weighted-split-paths-path --tile-factor --timing-log-level --timing-log-option
        --titles-data-path --tokenizer-name-or-path --tokenizer-not-use-fast --tokenizer-type --topk
        --train-data-exact-num-epochs --train-doc-idx-path --train-idx-path --train-iters
        --train-sample-idx-path --train-samples --train-shuffle-idx-path --train-tokens
        --train-weighted-split-paths --train-weighted-split-paths-path --triangle-attn
        --use-checkpoint-lr-scheduler --use-cpu-initialization --use-distributed-optimizer
        --use-fused-rotary-pos-emb --use-manual-layer-allocation --use-one-sent-docs --use-pin-memory
        --use-tutel --valid-weighted-split-paths --valid-weighted-split-paths-path --vocab-extra-ids
        --vocab-file --warmup --weight-decay --zero-allgather-bucket-size --zero-contigious-gradients
        --zero-reduce-bucket-size --zero-reduce-scatter --zero-stage
    """.split(),
    "asd-infer generate": """
        --max-length --max-new-tokens --task --temperature --top-k --top-p
    """.split(),
    "asd-eval run": """
        --greedy --max-new-tokens --task --task-data-path --temperature --top-k --top-p
    """.split(),
    "asd-data preprocess": """
        --append-eod --dataset-impl --datasets --handler-name --hf-datasets-params --input --json-keys
        --keep-newlines --log-interval --make-vocab-size-divisible-by --merge-file --output-prefix
        --pad-vocab-size-to --seq-length --split-sentences --streaming --tokenizer-name-or-path
        --tokenizer-not-use-fast --tokenizer-type --vocab-file --workers
    """.split(),
    "asd-ckpt convert": """
        --added-token-num --bias --deepspeed --input-model-dir --make-vocab-size-divisible-by
        --orig-vocab-size --output-model-dir --partition-layers --pipeline-model-parallel-size --pse
        --src-pipeline-model-parallel-size --src-tensor-model-parallel-size --tensor-model-parallel-size
        --tgt-pipeline-model-parallel-size --tgt-tensor-model-parallel-size --type
    """.split(),
}
"""Flags that the Python programs define: training (arguments.py), inference, evaluation, data, conversion."""
