// This file looks for what connections have left behind.

package e2e

import (
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// openDescriptors is what descriptors this process has open, but for those of
// the runtime's poller.
func openDescriptors(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(to, "anon_inode:[event") {
			open = append(open, e.Name()+" "+to)
		}
	}
	return open
}

// checkLeaks fails the test if a goroutine of a connection or an upstream, or more descriptors
// than before, are left.
func checkLeaks(t testing.TB, before []string) {
	t.Helper()
	http.DefaultClient.CloseIdleConnections()
	var stacks string
	if !eventually(20*time.Second, func() bool { stacks = ownGoroutines(); return stacks == "" }) {
		t.Errorf("goroutines left:\n%s", stacks)
	}
	var after []string
	if !eventually(20*time.Second, func() bool { after = openDescriptors(t); return len(after) <= len(before) }) {
		t.Errorf("open descriptors: got %q, want no more than before: %q", after, before)
	}
}

// ownGoroutines returns the stacks of the goroutines that run connections, and of those
// that watch upstreams.
func ownGoroutines() string {
	buf := make([]byte, 4<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var own []string
	for g := range strings.SplitSeq(string(buf), "\n\n") {
		for _, pkg := range []string{"session", "tunnel", "opening", "registry", "pool", "health"} {
			if strings.Contains(g, "caddy-holdfast/internal/"+pkg+".") {
				own = append(own, g)
				break
			}
		}
	}
	return strings.Join(own, "\n\n")
}
