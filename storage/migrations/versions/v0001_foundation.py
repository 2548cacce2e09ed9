"""API keys, base models, and adapters with versions, aliases and their history."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the first tables."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("prefix", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("rpm_limit", sa.Integer(), nullable=True),
        sa.Column("allowed_models", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("hash", name="uq_api_keys_hash"),
    )
    op.create_table(
        "base_models",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=True),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_base_models"),
    )
    _create_adapters()
    _create_aliases()


def _create_adapters() -> None:
    op.create_table(
        "adapter_blobs",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("writer", sa.String(), nullable=False),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_adapter_blobs"),
    )
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("base", sa.String(), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("next_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_adapters"),
    )
    op.create_index("ix_adapters_base", "adapters", ["base"])
    op.create_table(
        "adapter_versions",
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("alpha", sa.Double(), nullable=False),
        sa.Column("targets", sa.JSON(), nullable=False),
        sa.Column("use_dora", sa.Boolean(), nullable=False),
        sa.Column("use_rslora", sa.Boolean(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("origin", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=True),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter"], ["adapters.name"], name="fk_adapter_versions_adapter_adapters", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["digest"], ["adapter_blobs.digest"], name="fk_adapter_versions_digest_adapter_blobs", ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("adapter", "version", name="pk_adapter_versions"),
    )
    op.create_index("ix_adapter_versions_digest", "adapter_versions", ["digest"])


def _create_aliases() -> None:
    op.create_table(
        "adapter_aliases",
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("alias", sa.String(), nullable=False),
        sa.Column("weights", sa.JSON(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter"], ["adapters.name"], name="fk_adapter_aliases_adapter_adapters", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("adapter", "alias", name="pk_adapter_aliases"),
    )
    op.create_table(
        "adapter_alias_history",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("alias", sa.String(), nullable=False),
        sa.Column("weights", sa.JSON(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter", "alias"],
            ["adapter_aliases.adapter", "adapter_aliases.alias"],
            name="fk_adapter_alias_history_adapter_adapter_aliases",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_adapter_alias_history"),
    )
    op.create_index("ix_adapter_alias_history_alias", "adapter_alias_history", ["adapter", "alias"])


def downgrade() -> None:
    """Drop them again, the referring ones first."""
    for table in (
        "adapter_alias_history",
        "adapter_aliases",
        "adapter_versions",
        "adapters",
        "adapter_blobs",
        "base_models",
        "api_keys",
    ):
        op.drop_table(table)
