package store

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"

	"github.com/pressly/goose/v3"
)

//go:embed migrations/*.sql
var migrations embed.FS

// migrate brings the schema to this version. A database of a newer schema is refused before anything is changed:
// writing to tables that are only half understood would damage them.
func migrate(ctx context.Context, db *sql.DB) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, files)
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	have, want, err := p.GetVersions(ctx)
	if err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	if have > want {
		return fmt.Errorf("%w: its schema is %d, this version knows up to %d: upgrade signet-coordinator, or restore a backup made before the upgrade", ErrNewerSchema, have, want)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("upgrade schema from %d to %d: %w", have, want, err)
	}
	return nil
}
