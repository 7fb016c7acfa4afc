"""The flags of AscendSpeed 2023: of its README, of its shell scripts, and of what its programs define.

By the command that does today what the program did. The README is that of commit 6801afd1 of 27 October 2023; scripts
and programs are those of all commits of 2023, 127 scripts.
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
        --ascendspeed-model-dir --deepspeed --input-model-dir --output-huggingface-model-dir
        --output-model-dir --partition-layers --pipeline-model-parallel-size
        --src-pipeline-model-parallel-size --src-tensor-model-parallel-size --tensor-model-parallel-size
        --tgt-pipeline-model-parallel-size --tgt-tensor-model-parallel-size --type
    """.split(),
    "asd-ckpt merge-lora": """
        --ffn-hidden-size --fp16 --hidden-size --load --lora-alpha --lora-load --lora-r
        --lora-target-modules --master_addr --master_port --max-position-embeddings --micro-batch-size
        --nnodes --no-contiguous-buffers-in-local-ddp --node_rank --normalization --nproc_per_node
        --num-attention-heads --num-layers --pipeline-model-parallel-size --position-embedding-type --save
        --save-interval --seed --seq-length --tensor-model-parallel-size --tokenizer-name-or-path
        --tokenizer-not-use-fast --tokenizer-type
    """.split(),
    "asd-core finetune": """
        --DDP-impl --adam-beta1 --adam-beta2 --adam-eps --add-bias-linear --attention-dropout
        --attention-softmax-in-fp32 --bf16 --checkpoint-activations --checkpoint-policy
        --checkpoint_block_layer --checkpoint_num_layers --checkpoint_policy --clip-grad --data-impl
        --data-path --deepspeed --deepspeed-activation-checkpointing --deepspeed_config
        --disable-bias-linear --distributed-backend --embed-layernorm --eval-interval --eval-iters
        --ffn-hidden-size --finetune --fp16 --global-batch-size --hidden-dropout --hidden-size
        --init-method-std --initial-loss-scale --is-instruction-dataset --load --log-interval --lora-alpha
        --lora-load --lora-modules-to-save --lora-r --lora-target-modules --lr --lr-decay-iters
        --lr-decay-samples --lr-decay-style --lr-warmup-fraction --lr-warmup-iters --lr-warmup-samples
        --make-vocab-size-divisible-by --master_addr --master_port --max-position-embeddings --max_restarts
        --merge-file --micro-batch-size --min-lr --mlp-layer-fusion --nnodes --no-add-gate
        --no-attention-softmax-in-fp32 --no-contiguous-buffers-in-local-ddp
        --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --no-masked-softmax-fusion
        --no-pipeline-parallel --no-untie-embeddings-and-output-weights --node_rank --normalization
        --nproc_per_node --num-attention-heads --num-layers --optimizer --pad-vocab-size-to
        --pipeline-model-parallel-size --position-embedding-type --query-key-layer-scaling
        --rampup-batch-size --rdzv_backend --rdzv_endpoint --recompute-method --save --save-interval --seed
        --seq-length --sequence-parallel --split --swiglu --tee --tensor-model-parallel-size
        --tokenizer-model --tokenizer-name-or-path --tokenizer-not-use-fast --tokenizer-type --train-iters
        --train-samples --triangle-attn --untie-embeddings-and-output-weights --use-cpu-initialization
        --use-flash-attn --use-fused-rmsnorm --use-fused-rotary-pos-emb --use-unpad --variable-seq-lengths
        --vocab-file --weight-decay --zero-stage
    """.split(),
    "asd-core pretrain": """
        --DDP-impl --adam-beta1 --adam-beta2 --adam-eps --add-bias-linear --alibi-fill-inf
        --attention-dropout --attention-softmax-in-fp32 --auto-recompute-device-size
        --auto-recompute-profiling-step --bf16 --checkpoint-activations --checkpoint-policy
        --checkpoint_block_layer --checkpoint_policy --clip-grad --communication-slim --data-impl
        --data-path --dataloader-type --deepspeed --deepspeed-activation-checkpointing --deepspeed_config
        --disable-bias-linear --distributed-backend --embed-layernorm --eval-interval --eval-iters
        --ffn-hidden-size --fill-neg-inf --finetune --foldx-mode --fp16 --global-batch-size
        --group-query-attention --hidden-dropout --hidden-size --init-method-std --initial-loss-scale
        --is-instruction-dataset --keep-last-token --layernorm-epsilon --llama-mlp-layer-fusion
        --lm-norm-weight --load --log-batch-size-to-tensorboard --log-interval --log-timers-to-tensorboard
        --log-validation-ppl-to-tensorboard --lora-target-modules --lr --lr-decay-iters --lr-decay-samples
        --lr-decay-style --lr-warmup-fraction --lr-warmup-iters --lr-warmup-samples
        --make-vocab-size-divisible-by --manual-layers --manual-mbs --master_addr --master_port
        --max-position-embeddings --max_restarts --merge-file --micro-batch-size --min-lr --mlp-layer-fusion
        --nnodes --no-add-gate --no-async-tensor-model-parallel-allreduce --no-attention-softmax-in-fp32
        --no-barrier-with-level-1-timing --no-bias-gelu-fusion --no-gradient-accumulation-fusion
        --no-load-optim --no-load-rng --no-masked-softmax-fusion --no-pipeline-parallel
        --no-position-embedding --no-query-key-layer-scaling --no-untie-embeddings-and-output-weights
        --node_rank --normalization --nproc_per_node --num-attention-heads --num-layers
        --num-layers-per-virtual-pipeline-stage --num-query-groups --optimized-pipeline --optimizer
        --pad-vocab-size-to --padding-attention-mask --pipeline-model-parallel-size
        --position-embedding-type --query-key-layer-scaling --rampup-batch-size --rdzv_backend
        --rdzv_endpoint --recomputation-layer-num --recompute-granularity --recompute-method
        --recompute-num-layers --release-fp32-grad --rotary-v3-impl --save --save-interval --seed
        --seq-length --sequence-parallel --split --square-alibi-mask --swiglu --tee
        --tensor-model-parallel-size --tensorboard-dir --tensorboard-queue-size --tokenizer-model
        --tokenizer-name-or-path --tokenizer-not-use-fast --tokenizer-type --train-iters --train-samples
        --triangle-attn --triangle-block-size --untie-embeddings-and-output-weights
        --use-contiguous-buffers-in-ddp --use-cpu-initialization --use-distributed-optimizer
        --use-flash-attn --use-fused-rmsnorm --use-fused-rotary-pos-emb --use-manual-layer-allocation
        --use-rmsnorm-mix --use-rotary-position-embeddings --vocab-file --weight-decay --z-loss-weight
        --zero-stage
    """.split(),
    "asd-eval run": """
        --add-bias-linear --attention-dropout --bf16 --bias --deepspeed --deepspeed_config --embed-layernorm
        --exit-on-missing-checkpoint --ffn-hidden-size --fill-neg-inf --fp16 --global-batch-size
        --group-query-attention --hidden-dropout --hidden-size --init-method-std --internlm
        --layernorm-epsilon --lm-norm-weight --load --log-interval --make-vocab-size-divisible-by
        --master_addr --master_port --max-new-tokens --max-position-embeddings --micro-batch-size
        --mlp-layer-fusion --nnodes --no-add-gate --no-attention-softmax-in-fp32
        --no-contiguous-buffers-in-local-ddp --no-load-optim --no-load-rng --no-masked-softmax-fusion
        --no-position-embedding --no-untie-embeddings-and-output-weights --node_rank --normalization
        --nproc_per_node --num-attention-heads --num-layers --num-query-groups --num_gpus --num_nodes
        --pad-vocab-size-to --pipeline-model-parallel-size --position-embedding-type
        --query-key-layer-scaling --row-col-parallel-linear-bias --seed --seq-length --square-alibi-mask
        --task --task-data-path --tensor-model-parallel-size --tokenizer-name-or-path
        --tokenizer-not-use-fast --tokenizer-type --untie-embeddings-and-output-weights
        --use-checkpoint-args --use-flash-attn --use-fused-rmsnorm --use-rotary-position-embeddings
        --valid-data
    """.split(),
    "asd-infer generate": """
        --add-bias-linear --attention-dropout --attention-softmax-in-fp32 --bf16 --bias --deepspeed
        --deepspeed_config --disable-bias-linear --embed-layernorm --exit-on-missing-checkpoint
        --ffn-hidden-size --fill-neg-inf --fp16 --global-batch-size --group-query-attention --hidden-dropout
        --hidden-size --init-method-std --internlm --layernorm-epsilon --lm-norm-weight --load
        --log-interval --lora-alpha --lora-load --lora-r --lora-target-modules
        --make-vocab-size-divisible-by --master_addr --master_port --max-new-tokens
        --max-position-embeddings --max_new_tokens --micro-batch-size --mlp-layer-fusion --nnodes
        --no-add-gate --no-attention-softmax-in-fp32 --no-contiguous-buffers-in-local-ddp
        --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --no-masked-softmax-fusion
        --no-pipeline-parallel --no-position-embedding --no-untie-embeddings-and-output-weights --node_rank
        --normalization --nproc_per_node --num-attention-heads --num-layers --num-query-groups --num_gpus
        --num_nodes --out-seq-length --pad-vocab-size-to --pipeline-model-parallel-size
        --position-embedding-type --query-key-layer-scaling --recompute --rotary-v3-impl
        --row-col-parallel-linear-bias --seed --seq-length --square-alibi-mask --swiglu --task --temperature
        --tensor-model-parallel-size --tokenizer-model --tokenizer-name-or-path --tokenizer-not-use-fast
        --tokenizer-type --top_p --untie-embeddings-and-output-weights --use-checkpoint-args
        --use-flash-attn --use-fused-rmsnorm --use-rotary-position-and-embeddings
        --use-rotary-position-embeddings
    """.split(),
}
"""Flags in the shell scripts of `examples`, `tasks`, `tests` and `tools`, those of the launcher included."""

PROGRAMS = {
    "asd-core finetune": """
        --DDP-impl --accumulate-allreduce-grads-in-fp32 --adam-beta1 --adam-beta2 --adam-eps
        --add-bias-linear --add-gate --adlr-autoresume --adlr-autoresume-interval --alibi-fill-inf
        --aml-data-download-path --apply-layernorm-1p --apply-residual-connection-post-layernorm
        --attention-dropout --attention-softmax-in-fp32 --auto-recompute-device-size
        --auto-recompute-profiling-step --batch-size --bert-load --bert-no-binary-head --bf16
        --biencoder-projection-dim --biencoder-shared-query-context-model --block-data-path
        --checkpoint-activations --checkpoint-in-cpu --checkpoint-num-layers --checkpoint_block_layer
        --checkpoint_policy --clip-grad --communication-slim --context-parallel-size
        --contigious-checkpointing --cpu-optimizer --cpu_torch_adam --create-moe-param-group
        --data-efficiency-curriculum-learning --data-impl --data-path --dataloader-type --decoder-num-layers
        --decoder-seq-length --deepspeed-activation-checkpointing --delay-param-gather --disable-bias-linear
        --disable-moe-token-dropping --disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad
        --disable-tp-comm-split-ag --disable-tp-comm-split-rs --distribute-checkpointed-activations
        --distribute-saved-activations --distributed-backend --distributed-timeout-minutes --ds-inference
        --embed-layernorm --embedding-path --embedding-weights-in-fp32 --empty-unused-memory-level
        --enable-expert-tensor-parallelism --encoder-num-layers --encoder-seq-length --eod-mask-loss
        --eval-interval --eval-iters --evidence-data-path --exit-duration-in-mins --exit-interval
        --exit-signal-handler --expert-interval --expert-model-parallel-size --ffn-hidden-size
        --fill-neg-inf --finetune --foldx-dp --foldx-mode --fp16 --fp16-lm-cross-entropy
        --fp32-residual-connection --global-batch-size --group-query-attention --hidden-dropout
        --hidden-size --hidden-size-teacher --hysteresis --ict-head-size --ict-load --img-dim
        --indexer-batch-size --indexer-log-interval --inference --init-method-std
        --init-method-xavier-uniform --initial-loss-scale --is-instruction-dataset --kd --kd-alpha-ce
        --kd-beta-ce --kd-temp --keep-last-token --kv-channels --layernorm-epsilon --lazy-mpu-init
        --lm-norm-weight --load --load-teacher --local-rank --local_rank --log-batch-size-to-tensorboard
        --log-interval --log-num-zeros-in-grad --log-optimizer-states-to-tensorboard --log-params-norm
        --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard --lora-adapter-name --lora-alpha
        --lora-load --lora-modules-to-save --lora-r --lora-register-forward-hook --lora-target-modules
        --loss-on-targets-only --loss-scale --loss-scale-window --lr --lr-decay-iters --lr-decay-samples
        --lr-decay-style --lr-decay-tokens --lr-warmup-fraction --lr-warmup-iters --lr-warmup-samples
        --lr-warmup-tokens --make-vocab-size-divisible-by --manual-gc --manual-gc-interval --manual-layers
        --manual-mbs --mask-prob --max-position-embeddings --memory-centric-tiled-linear --merge-file
        --micro-batch-size --min-loss-scale --min-lr --mlp-layer-fusion --mlp-type --mmap-warmup
        --model-parallel-size --moe-eval-capacity-factor --moe-expert-parallel-size --moe-loss-coeff
        --moe-min-capacity --moe-train-capacity-factor --mos --nccl-communicator-config-path --no-add-gate
        --no-async-tensor-model-parallel-allreduce --no-attention-softmax-in-fp32
        --no-barrier-with-level-1-timing --no-bias-dropout-fusion --no-bias-gelu-fusion
        --no-check-for-nan-in-loss-and-grad --no-clone-scatter-output-in-embedding
        --no-contiguous-buffers-in-local-ddp --no-delay-grad-reduce --no-gradient-accumulation-fusion
        --no-initialization --no-load-lr-state --no-load-optim --no-load-rng
        --no-log-learnig-rate-to-tensorboard --no-log-loss-scale-to-tensorboard --no-manual-gc-eval
        --no-masked-softmax-fusion --no-overlap-p2p-communication --no-persist-layer-norm
        --no-pipeline-parallel --no-query-key-layer-scaling --no-save-optim --no-save-rng
        --no-scatter-gather-tensors-in-pipeline --no-untie-embeddings-and-output-weights --normalization
        --num-attention-heads --num-attention-heads-teacher --num-channels --num-classes --num-experts
        --num-experts-teacher --num-layers --num-layers-per-virtual-pipeline-stage --num-layers-teacher
        --num-query-groups --num-workers --onnx-safe --openai-gelu --optimized-pipeline --optimizer
        --overlap-grad-reduce --overlap-param-gather --override-lr-scheduler --pad-vocab-size-to
        --padding-attention-mask --partition-activations --patch-dim --pipeline-model-parallel-size
        --pipeline-model-parallel-split-rank --position-embedding-type --profile --profile-backward
        --profile-ranks --profile-step-end --profile-step-start --query-in-block-prob
        --query-key-layer-scaling --rampup-batch-size --random-ltd --recomputation-layer-num
        --recompute-activations --recompute-granularity --recompute-method --recompute-num-layers
        --release-fp32-grad --remote-device --reset-attention-mask --reset-iteration --reset-position-ids
        --retriever-report-topk-accuracies --retriever-score-scaling --retriever-seq-length
        --retro-add-retriever --retro-encoder-attention-dropout --retro-encoder-hidden-dropout
        --retro-encoder-layers --retro-num-neighbors --retro-num-retrieved-chunks --retro-return-doc-ids
        --retro-workdir --return-data-index --rotary-percent --rotary-v3-impl --sample-rate --save
        --save-interval --save-to-cpu --scattered-embeddings --seed --seq-length --sequence-parallel
        --sgd-momentum --short-seq-prob --split --split-transformers --square-alibi-mask --squared-relu
        --standalone-embedding-stage --swiglu --synchronize-each-layer --tensor-model-parallel-size
        --tensorboard-dir --tensorboard-log-interval --tensorboard-queue-size --test-weighted-split-paths
        --test-weighted-split-paths-path --tile-factor --timing-log-level --timing-log-option
        --titles-data-path --tokenizer-name-or-path --tokenizer-not-use-fast --tokenizer-type --topk
        --tp-comm-overlap --tp-comm-overlap-cfg --train-data-exact-num-epochs --train-doc-idx-path
        --train-idx-path --train-iters --train-sample-idx-path --train-samples --train-shuffle-idx-path
        --train-tokens --train-weighted-split-paths --train-weighted-split-paths-path --transformer-impl
        --triangle-attn --triangle-block-size --untie-embeddings-and-output-weights
        --use-checkpoint-lr-scheduler --use-contiguous-buffers-in-ddp --use-cpu-initialization
        --use-distributed-optimizer --use-flash-attn --use-fused-rmsnorm --use-fused-rotary-pos-emb
        --use-manual-layer-allocation --use-mcore-models --use-one-sent-docs --use-pin-memory
        --use-ring-exchange-p2p --use-rmsnorm-mix --use-rotary-position-embeddings --use-tutel --use-unpad
        --valid-weighted-split-paths --valid-weighted-split-paths-path --variable-seq-lengths
        --vocab-extra-ids --vocab-file --warmup --weight-decay --z-loss-weight --zero-allgather-bucket-size
        --zero-contigious-gradients --zero-reduce-bucket-size --zero-reduce-scatter --zero-stage
    """.split(),
    "asd-infer generate": """
        --bias --internlm --max-length --max-new-tokens --row-col-parallel-linear-bias --task --temperature
        --top-k --top-p
    """.split(),
    "asd-eval run": """
        --bias --greedy --internlm --max-new-tokens --row-col-parallel-linear-bias --task --task-data-path
        --temperature --top-k --top-p
    """.split(),
    "asd-data preprocess": """
        --append-eod --dataset-impl --datasets --handler-name --hf-datasets-params --input --json-keys
        --keep-newlines --log-interval --make-vocab-size-divisible-by --merge-file --output-prefix
        --pad-vocab-size-to --seq-length --split-sentences --streaming --tokenizer-name-or-path
        --tokenizer-not-use-fast --tokenizer-type --vocab-file --workers
    """.split(),
    "asd-ckpt convert": """
        --added-token-num --ascendspeed-model-dir --bias --deepspeed --input-model-dir --load-dir
        --load_weight_map --loader --make-vocab-size-divisible-by --max-queue-size --megatron-path
        --merge-mlp --model-type --no-checking --num-heads --num-kv-heads --num_heads --num_kv_heads
        --orig-vocab-size --output-huggingface-model-dir --output-model-dir --partition-layers
        --pipeline-model-parallel-size --pse --save-dir --saver --src-pipeline-model-parallel-size
        --src-tensor-model-parallel-size --target-pipeline-parallel-size --target-tensor-parallel-size
        --tensor-model-parallel-size --tgt-pipeline-model-parallel-size --tgt-tensor-model-parallel-size
        --tokenizer-model --true-vocab-size --type --use_wpack_rotray
    """.split(),
}
"""Flags that the Python programs define: training (arguments.py), inference, evaluation, data, conversion."""
