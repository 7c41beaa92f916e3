// This file has a look at the sockets of a Caddy that is a process of its own.

package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// sockets counts those that the process has.
func (p *process) sockets(t testing.TB) (n int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", p.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink(dir + e.Name()); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}
