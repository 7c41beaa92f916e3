// This file keeps what Caddy logs, in this process, about the registry.

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// logsNotices are global options that have Caddy log what the registry notices;
// keepsNotices has it kept here, beside.
const (
	logsNotices  = "log notices {\n include connection_registry\n level INFO\n}\n"
	keepsNotices = "log notices {\n include connection_registry\n level INFO\n output e2e_notices\n}\n"
)

func init() { caddy.RegisterModule(new(noticeWriter)) }

// noticeWriter is a log's output: a file would be a descriptor that Caddy never closes.
type noticeWriter struct{}

// notices are the lines of all such logs since forget.
var notices struct {
	mu   sync.Mutex
	text strings.Builder
}

func (*noticeWriter) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.logging.writers.e2e_notices", New: func() caddy.Module { return new(noticeWriter) }}
}

func (*noticeWriter) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { d.Next(); return nil }
func (*noticeWriter) String() string                                  { return "e2e_notices" }
func (*noticeWriter) WriterKey() string                               { return "e2e_notices" }
func (w *noticeWriter) OpenWriter() (io.WriteCloser, error)           { return w, nil }
func (*noticeWriter) Close() error                                    { return nil }

func (*noticeWriter) Write(p []byte) (int, error) {
	notices.mu.Lock()
	defer notices.mu.Unlock()
	return notices.text.Write(p)
}

func forgetNotices() {
	notices.mu.Lock()
	defer notices.mu.Unlock()
	notices.text.Reset()
}

// wantNotices waits until Caddy has logged these lines that begin so, as level, message
// and count.
func wantNotices(t testing.TB, begin string, want ...string) {
	t.Helper()
	var got []string
	if !eventually(20*time.Second, func() bool {
		notices.mu.Lock()
		text := notices.text.String()
		notices.mu.Unlock()
		got = nil
		for line := range strings.Lines(text) {
			var e struct {
				Level, Msg string
				Count      int
			}
			if json.Unmarshal([]byte(line), &e) == nil && strings.HasPrefix(e.Msg, begin) {
				got = append(got, fmt.Sprintf("%s: %s: %d", e.Level, e.Msg, e.Count))
			}
		}
		return slices.Equal(got, want)
	}) {
		t.Errorf("notices: got %q, want %q", got, want)
	}
}
