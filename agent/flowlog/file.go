package flowlog

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
)

const retryFile = 5 * time.Second

// File appends records to a file, one JSON document on each line.
type File struct {
	path   string
	log    *slog.Logger
	reopen chan struct{}

	file    *os.File
	lost    uint64
	pending []byte
}

// NewFile prepares a file writer; Run opens the file.
func NewFile(path string, log *slog.Logger) *File {
	return &File{path: path, log: log, reopen: make(chan struct{}, 1)}
}

// Reopen opens the file anew, after something else has renamed it.
func (f *File) Reopen() {
	select {
	case f.reopen <- struct{}{}:
	default:
	}
}

// Run writes what l records until ctx ends. A disk that fails loses records, counted, and never stops the agent.
func (f *File) Run(ctx context.Context, l *Log) error {
	_, sub := l.Subscribe()
	if sub == nil {
		return fmt.Errorf("write flow records: more than %d readers", MaxSubscribers)
	}
	defer sub.Close()
	defer f.close()
	failedAt := time.Time{}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.reopen:
			f.close()
		case r := <-sub.queue:
			if !failedAt.IsZero() && time.Since(failedAt) < retryFile {
				f.lose(r)
				continue
			}
			if err := f.write(l.node, r); err != nil {
				if failedAt.IsZero() {
					f.log.Error("flow records are not written", "file", f.path, "error", err)
				}
				f.lose(r)
				f.close()
				failedAt = time.Now()
				continue
			}
			failedAt = time.Time{}
		}
	}
}

// lose counts a record that was not written; a loss record stands for as many as it says.
func (f *File) lose(r flow.Record) {
	if r.Event == flow.EventLoss {
		f.lost += r.Count
		return
	}
	f.lost++
}

func (f *File) write(node string, r flow.Record) error {
	if f.file == nil {
		file, err := os.OpenFile(f.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
		if err != nil {
			return fmt.Errorf("open: %w", err)
		}
		f.file = file
	}
	f.pending = f.pending[:0]
	records := []flow.Record{r}
	if f.lost > 0 {
		records = []flow.Record{lossRecord(node, f.lost, r), r}
	}
	for _, one := range records {
		b, err := json.Marshal(one)
		if err != nil {
			return fmt.Errorf("encode: %w", err)
		}
		f.pending = append(append(f.pending, b...), '\n')
	}
	if _, err := f.file.Write(f.pending); err != nil {
		return fmt.Errorf("append: %w", err)
	}
	f.lost = 0
	return nil
}

func (f *File) close() {
	if f.file != nil {
		_ = f.file.Close()
		f.file = nil
	}
}
