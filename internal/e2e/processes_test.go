// This file holds backends that are processes of their own, so that they can be
// killed, stopped, frozen and started again, and what they record.

package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// backendKinds says how each kind of backend is started. They take the same flags,
// the first two more than the others: see internal/e2e/backend.
var backendKinds = map[string]func(t testing.TB) []string{
	"coder":   func(t testing.TB) []string { return []string{goBackend(t), "-stack", "coder"} },
	"gorilla": func(t testing.TB) []string { return []string{goBackend(t), "-stack", "gorilla"} },
	"node":    func(t testing.TB) []string { return []string{tool(t, "node"), "../../testdata/node/backend.mjs"} },
	// Debian's own Python: another one, first in PATH, has not Debian's packages.
	"python": func(t testing.TB) []string {
		return []string{tool(t, "/usr/bin/python3"), "../../testdata/python/backend.py"}
	},
}

// goBackend builds internal/e2e/backend once, without the race detector, and returns
// its path. It goes with the test process.
func goBackend(t testing.TB) string {
	t.Helper()
	path, err := builtBackend()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var builtBackend = sync.OnceValues(func() (string, error) {
	path := filepath.Join(storage, "backend")
	out, err := exec.Command("go", "build", "-o", path, "./backend").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building the backend: %w: %s", err, out)
	}
	return path, nil
})

// backendProcess is a backend: several processes, one after the other, with one
// address and one record.
type backendProcess struct {
	name string
	addr string // host:port, the same over all its lives
	args []string
	file string // the record
	life *life  // the latest
}

// life is one process of a backend.
type life struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  chan string   // what it prints; closed by watch. It prints few
	exited chan struct{} // closed by watch, when the process has ended
	err    error         // how it ended; valid after exited
	stderr bytes.Buffer  // valid after exited
}

// startBackend starts a backend of a kind and returns when it listens. It is killed
// when the test ends, if it still runs.
func startBackend(t testing.TB, kind, name string, flags ...string) *backendProcess {
	t.Helper()
	return startBackendAt(t, freeAddr(t), kind, name, flags...)
}

// startBackendAt is startBackend at an address of the test's choice.
func startBackendAt(t testing.TB, addr, kind, name string, flags ...string) *backendProcess {
	t.Helper()
	b := &backendProcess{name: name, addr: addr, file: filepath.Join(t.TempDir(), name+".jsonl")}
	b.args = append(backendKinds[kind](t), "-listen", b.addr, "-name", name, "-record", b.file)
	b.args = append(b.args, flags...)
	t.Cleanup(func() { b.end(t) })
	b.start(t)
	return b
}

// start starts a process and returns when it listens.
func (b *backendProcess) start(t testing.TB, flags ...string) {
	t.Helper()
	l := &life{lines: make(chan string, 16), exited: make(chan struct{})}
	l.cmd = exec.Command(b.args[0], append(b.args[1:len(b.args):len(b.args)], flags...)...)
	l.cmd.Stderr = &l.stderr
	var err error
	if l.stdin, err = l.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	b.life = l
	go l.watch(stdout)
	if got := b.line(t); got != b.addr {
		t.Fatalf("backend %s: got %q, want that it listens on %s", b.name, got, b.addr)
	}
}

// watch owns the process's output and reaps it. It ends with the process.
func (l *life) watch(stdout io.Reader) {
	defer close(l.exited)
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		l.lines <- lines.Text()
	}
	close(l.lines)
	l.err = l.cmd.Wait()
}

// line returns the next line that the process prints.
func (b *backendProcess) line(t testing.TB) string {
	t.Helper()
	select {
	case line, ok := <-b.life.lines:
		if !ok {
			<-b.life.exited
			t.Fatalf("backend %s ended: %v: %s", b.name, b.life.err, &b.life.stderr)
		}
		return line
	case <-time.After(20 * time.Second):
		t.Fatalf("backend %s says nothing", b.name)
		return ""
	}
}

// end kills what still runs.
func (b *backendProcess) end(t testing.TB) {
	t.Helper()
	if b.life == nil {
		return
	}
	_ = b.life.cmd.Process.Kill() // fails only when it has ended
	<-b.life.exited
	if t.Failed() {
		t.Logf("backend %s wrote:\n%s", b.name, &b.life.stderr)
	}
}

func (b *backendProcess) signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := b.life.cmd.Process.Signal(sig); err != nil {
		t.Fatalf("backend %s: %v: %v", b.name, sig, err)
	}
}

// exit waits until the process has ended and returns its exit code, -1 if a signal
// ended it.
func (b *backendProcess) exit(t testing.TB) int {
	t.Helper()
	select {
	case <-b.life.exited:
		return b.life.cmd.ProcessState.ExitCode()
	case <-time.After(20 * time.Second):
		t.Fatalf("backend %s does not end", b.name)
		return 0
	}
}

// kill ends backends by SIGKILL, all at once, and returns when they have ended.
func kill(t testing.TB, backends ...*backendProcess) {
	t.Helper()
	for _, b := range backends {
		b.signal(t, syscall.SIGKILL)
	}
	for _, b := range backends {
		if code := b.exit(t); code != -1 {
			t.Errorf("backend %s: got exit code %d, want that it was killed: %s", b.name, code, &b.life.stderr)
		}
	}
}

// term ends backends by SIGTERM, all at once: they close their connections in good
// order. It returns when they have ended.
func term(t testing.TB, backends ...*backendProcess) {
	t.Helper()
	for _, b := range backends {
		b.signal(t, syscall.SIGTERM)
	}
	for _, b := range backends {
		if code := b.exit(t); code != 0 {
			t.Errorf("backend %s: got exit code %d after SIGTERM, want 0: %s", b.name, code, &b.life.stderr)
		}
		if said := b.life.stderr.String(); said != "" {
			t.Errorf("backend %s: it did not end in good order: %s", b.name, said)
		}
	}
}

// restart starts, at the same address and with the same flags and some more, a backend
// that has ended, and returns when it listens.
func (b *backendProcess) restart(t testing.TB, flags ...string) {
	t.Helper()
	b.exit(t)
	b.start(t, flags...)
}

// freeze stops the process without ending it: its sockets live, nobody reads them. It
// returns when no thread of it runs any more.
func (b *backendProcess) freeze(t testing.TB) {
	t.Helper()
	b.signal(t, syscall.SIGSTOP)
	threads := fmt.Sprintf("/proc/%d/task/*/stat", b.life.cmd.Process.Pid)
	if !eventually(10*time.Second, func() bool {
		files, _ := filepath.Glob(threads)
		return len(files) > 0 && !slices.ContainsFunc(files, func(file string) bool {
			stat, _ := os.ReadFile(file)
			_, state, _ := bytes.Cut(stat, []byte(") "))
			return !bytes.HasPrefix(state, []byte("T"))
		})
	}) {
		t.Fatalf("backend %s does not stop", b.name)
	}
}

// thaw lets it go on.
func (b *backendProcess) thaw(t testing.TB) {
	t.Helper()
	b.signal(t, syscall.SIGCONT)
}

// refuse has a backend written in Go refuse handshakes with a status from now on, or
// accept them again if that is 0.
func (b *backendProcess) refuse(t testing.TB, status int) {
	t.Helper()
	order := fmt.Sprintf("refuse %d", status)
	if _, err := io.WriteString(b.life.stdin, order+"\n"); err != nil {
		t.Fatalf("backend %s: %v", b.name, err)
	}
	if got := b.line(t); got != order {
		t.Fatalf("backend %s: got %q, want %q", b.name, got, order)
	}
}

// record is a line of a backend's record; see internal/e2e/backend.
type record struct {
	Backend string `json:"-"`
	Time    int64
	Event   string
	PID     int
	Seq     int64
	Conn    string
	Resume  string
	Text    string
	Binary  []byte
	Code    int
}

// records returns what the backend has recorded until now, over all its lives.
func (b *backendProcess) records(t testing.TB) []record {
	t.Helper()
	data, err := os.ReadFile(b.file)
	if err != nil {
		t.Fatal(err)
	}
	var all []record
	for line := range bytes.SplitSeq(data, []byte("\n")) {
		r := record{Backend: b.name}
		err := json.Unmarshal(line, &r)
		switch {
		case err == nil:
			all = append(all, r)
		case !bytes.HasSuffix(line, []byte("}")): // cut short by a kill, or the end
		default:
			t.Fatalf("record of backend %s: %v: %s", b.name, err, line)
		}
	}
	return all
}

// backendConn is a connection as its backend recorded it.
type backendConn struct {
	backend string
	opened  int64 // Unix time in nanoseconds
	resume  string
	texts   []string // messages, of either type
	code    int      // with which the peer closed; 0 if the connection was alive at the end
}

// String describes the connection for a person.
func (c *backendConn) String() string {
	return fmt.Sprintf("{backend %s, opened %s, resume %q, %d messages, closed %d}", c.backend,
		time.Unix(0, c.opened).Format("05.000"), c.resume, len(c.texts), c.code)
}

// backendConns returns what backends have recorded until now of each of Holdfast's
// connections, oldest first. The one that resumes nothing is the oldest: a backend may be
// slow to record that it was opened.
func backendConns(t testing.TB, backends ...*backendProcess) map[string][]*backendConn {
	t.Helper()
	byID := make(map[string][]*backendConn)
	for _, b := range backends {
		var live map[int64]*backendConn // of one process, by Seq
		for _, r := range b.records(t) {
			if r.Event != "start" && r.Event != "open" && r.Event != "refused" && live[r.Seq] == nil {
				t.Fatalf("record of backend %s: %s of a connection that was not opened: %+v", b.name, r.Event, r)
			}
			switch r.Event {
			case "start":
				live = make(map[int64]*backendConn)
			case "open":
				live[r.Seq] = &backendConn{backend: r.Backend, opened: r.Time, resume: r.Resume}
				byID[r.Conn] = append(byID[r.Conn], live[r.Seq])
			case "text":
				live[r.Seq].texts = append(live[r.Seq].texts, r.Text)
			case "binary":
				live[r.Seq].texts = append(live[r.Seq].texts, string(r.Binary))
			case "closed":
				live[r.Seq].code = r.Code
			}
		}
	}
	for _, conns := range byID {
		slices.SortFunc(conns, func(a, b *backendConn) int {
			return cmp.Or(cmp.Compare(min(len(a.resume), 1), min(len(b.resume), 1)), cmp.Compare(a.opened, b.opened))
		})
	}
	return byID
}
