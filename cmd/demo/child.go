// This file holds child: one backend process, which can be started, killed,
// stopped, waited for, and started again on the same address.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	childStartTimeout = 10 * time.Second
	childStopTimeout  = 5 * time.Second
)

// child is a backend that runs as a process of its own. Its first start picks
// a free port; later ones listen on the same address, so that the proxy's
// configuration stays true.
type child struct {
	name string

	mu      sync.Mutex // protects the fields below
	listen  string
	process *process // nil before the first start; the ended one between two starts
}

// process is one life of a child.
type process struct {
	cmd *exec.Cmd
	// Closing it asks the process to end. The kernel does so as well when
	// this process dies.
	stdin io.Closer
	// Set before an end that is wanted, so that it is not reported.
	expected atomic.Bool
	// The address that the process listens on. Closed by watch; it has room
	// for the one value so that watch never waits for a reader.
	ready chan string
	done  chan struct{} // closed by watch when the process has ended
	err   error         // how it ended; read it after done
}

func newChild(name string) *child {
	return &child{name: name, listen: "127.0.0.1:0"}
}

// start returns once the backend listens. Starting one that runs is an error.
func (c *child) start() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.process != nil && !c.process.ended() {
		return fmt.Errorf("starting backend %s: it is running already", c.name)
	}
	p, err := c.spawn()
	if err != nil {
		return fmt.Errorf("starting backend %s: %w", c.name, err)
	}
	select {
	case addr, ok := <-p.ready:
		if !ok {
			<-p.done
			return fmt.Errorf("starting backend %s: it ended at once: %s", c.name, p.cmd.ProcessState)
		}
		c.listen, c.process = addr, p
		return nil
	case <-time.After(childStartTimeout):
		p.kill()
		<-p.done
		return fmt.Errorf("starting backend %s: not listening after %s", c.name, childStartTimeout)
	}
}

func (c *child) spawn() (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "backend", "--name", c.name, "--listen", c.listen)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, stdin: stdin, ready: make(chan string, 1), done: make(chan struct{})}
	go p.watch(c.name, stdout)
	return p, nil
}

// watch owns the process's stdout and reaps it: it passes the address on,
// closes ready, and closes done when the process has ended, which ends it.
func (p *process) watch(name string, stdout io.Reader) {
	lines := bufio.NewReader(stdout)
	addr, failed := lines.ReadString('\n')
	if failed == nil {
		p.ready <- strings.TrimSpace(addr)
	}
	close(p.ready)
	_, _ = lines.WriteTo(io.Discard)
	p.err = p.cmd.Wait()
	if failed == nil && !p.expected.Load() { // else start reports it
		fmt.Fprintf(os.Stderr, "backend %s ended: %s\n", name, p.cmd.ProcessState)
	}
	close(p.done)
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) kill() {
	p.expected.Store(true)
	_ = p.cmd.Process.Kill() // fails only when it has ended
}

// current is the child's latest life, or nil before its first start.
func (c *child) current() *process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.process
}

// kill ends the process with no chance to say goodbye. It does not wait.
func (c *child) kill() {
	if p := c.current(); p != nil {
		p.kill()
	}
}

// wait returns when the process has ended, with what ended it: nil when it
// exited in good order.
func (c *child) wait() error {
	p := c.current()
	if p == nil {
		return nil
	}
	<-p.done
	return p.err
}

// stop asks the process to end, waits for it, and kills it if it takes too
// long. Stopping one that has ended does nothing.
func (c *child) stop() {
	p := c.current()
	if p == nil {
		return
	}
	p.expected.Store(true)
	_ = p.stdin.Close()
	select {
	case <-p.done:
	case <-time.After(childStopTimeout):
		p.kill()
		<-p.done
	}
}

// address is where the child listens, the same over all its lives.
func (c *child) address() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.listen
}

// pid is the process of the child's latest life, 0 before its first.
func (c *child) pid() int {
	if p := c.current(); p != nil {
		return p.cmd.Process.Pid
	}
	return 0
}
