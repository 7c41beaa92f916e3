// This file runs Node.js, and in it the client and the backend written with ws.

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

func TestWSClient(t *testing.T) {
	testGuest(t, wsGuest{nodeGuest{startNode(t, "ws_client.cjs")}}, habits{needsReply: true, codes: []uint16{1000, 1001, 1005, 3000, 4999}})
}

func startWSBackend(t testing.TB) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var addr string
	if err := startNode(t, "ws_backend.cjs").call(ctx, "address", nil, &addr); err != nil {
		t.Fatal(err)
	}
	return addr
}

// wsGuest is the guest that is written with ws.
type wsGuest struct{ nodeGuest }

func (g wsGuest) fragments(ctx context.Context, m content, cuts []int) (message, error) {
	return called[message](ctx, g.node, "fragments", map[string]any{"message": m, "cuts": cuts})
}

// nodeGuest is a guest that a script has: client.js, on top of ws or in a page.
type nodeGuest struct{ node *node }

func (nodeGuest) visit(context.Context, *proxy) error { return nil }

func (g nodeGuest) open(ctx context.Context, to target) (opened, error) {
	if to.Protocols == nil {
		to.Protocols = []string{}
	}
	return called[opened](ctx, g.node, "open", to)
}

func (g nodeGuest) echo(ctx context.Context, m content) (message, error) {
	return called[message](ctx, g.node, "echo", m)
}

func (g nodeGuest) next(ctx context.Context) (message, error) {
	return called[message](ctx, g.node, "next", nil)
}

func (g nodeGuest) close(ctx context.Context, e ending) (ending, error) {
	return called[ending](ctx, g.node, "close", e)
}

func (g nodeGuest) closed(ctx context.Context) (ending, error) {
	return called[ending](ctx, g.node, "closed", nil)
}

func called[T any](ctx context.Context, n *node, op string, args any) (result T, err error) {
	err = n.call(ctx, op, args, &result)
	return result, err
}

// node is a script of testdata that runs in Node.js and does what it is asked to.
type node struct {
	requests io.WriteCloser
	pipe     *os.File
	answers  *bufio.Reader // of pipe
	last     int           // id of the last call
	stderr   bytes.Buffer  // valid after the process has ended
}

// startNode starts a script. It ends when the test does.
func startNode(t testing.TB, script string, args ...string) *node {
	t.Helper()
	path := tool(t, "node")
	for _, pkg := range []string{"ws", "playwright-core"} {
		if _, err := os.Stat(filepath.Join("../../testdata/node/node_modules", pkg)); err != nil {
			t.Fatalf("npm package %s: %v; ./test installs it", pkg, err)
		}
	}
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{pipe: out, answers: bufio.NewReader(out)}
	cmd := exec.Command(path, append([]string{filepath.Join("testdata", script)}, args...)...)
	cmd.Stdout, cmd.Stderr = w, &n.stderr
	cmd.WaitDelay = time.Second // for what it leaves behind that holds stderr
	n.requests, err = cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	w.Close()
	if err != nil {
		out.Close()
		t.Fatalf("starting %s: %v", script, err)
	}
	t.Cleanup(func() {
		n.requests.Close()
		timer := time.AfterFunc(15*time.Second, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", script, err)
		}
		out.Close()
		if t.Failed() {
			t.Logf("%s wrote:\n%s", script, &n.stderr)
		}
	})
	return n
}

// call has the script do op and decodes the result into out. Calls do not overlap.
func (n *node) call(ctx context.Context, op string, args, out any) error {
	n.last++
	request, err := json.Marshal(map[string]any{"id": n.last, "op": op, "args": args})
	if err != nil {
		return err
	}
	if _, err := n.requests.Write(append(request, '\n')); err != nil {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := n.pipe.SetReadDeadline(deadline); err != nil {
			return err
		}
	}
	for {
		line, err := n.answers.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("waiting for %s: %w", op, err)
		}
		var answer struct {
			ID     int
			Result json.RawMessage
			Error  string
		}
		switch err := json.Unmarshal(line, &answer); {
		case err != nil:
			return fmt.Errorf("answer to %s: %w: %s", op, err, line)
		case answer.ID != n.last: // of a call that took too long
			continue
		case answer.Error != "":
			return errors.New(answer.Error)
		default:
			return json.Unmarshal(answer.Result, out)
		}
	}
}

// tool returns the path of a program that the tests cannot do without.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v; ./test installs it", err)
	}
	return path
}
