// This file tests what tunnels hold while they wait.

package tunnel

import (
	"bytes"
	"io"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func TestIdleTunnelHoldsNoPipe(t *testing.T) {
	const tunnels = 100
	before := openPipes(t)
	var rigs []*rig
	ping, pong := strings.Repeat("ping", 50_000), strings.Repeat("pong", 50_000) // few bytes need none
	for range tunnels {
		r, client, backend := tcpRig(t, Settings{}, "")
		for range 3 {
			send(t, client, ping)
			wantText(t, backend, ping)
			send(t, backend, pong)
			wantText(t, client, pong)
		}
		rigs = append(rigs, r)
	}
	// A message is there before its pump has given the pipe back.
	await(t, "spare pipes for the few that moved bytes at once", func() bool {
		pipes.mu.Lock()
		defer pipes.mu.Unlock()
		return pipes.made == len(pipes.spare)
	})
	if got := openPipes(t) - before; got == 0 || got > 2*8 {
		t.Errorf("got %d ends of pipes for %d idle tunnels, want a few, to be shared", got, tunnels)
	}
	for _, r := range rigs {
		r.rec.Close(registry.Ending{Reason: registry.Admin})
		r.tunnel.Abort()
		<-r.done
	}
	if got := openPipes(t) - before; got != 0 {
		t.Errorf("got %d ends of pipes after the last tunnel, want none", got)
	}
}

// Few bytes at once are copied, many are not.
func TestOnlyManyBytesTakeAPipe(t *testing.T) {
	before := openPipes(t)
	r, client, backend := tcpRig(t, Settings{}, "")
	for _, size := range []int{1, 100, fewBytes - 1} {
		few := strings.Repeat("x", size)
		send(t, client, few)
		wantText(t, backend, few)
		send(t, backend, few)
		wantText(t, client, few)
	}
	if got := openPipes(t) - before; got != 0 {
		t.Errorf("got %d ends of pipes after few bytes, want none", got)
	}
	many := strings.Repeat("x", 1<<20)
	all := make(chan struct{})
	go func() {
		defer close(all)
		_, _ = io.WriteString(client, many)
	}()
	wantText(t, backend, many)
	<-all
	if got := openPipes(t) - before; got != 2 {
		t.Errorf("got %d ends of pipes after many bytes, want those of one", got)
	}
	_, _ = client.CloseWrite(), backend.CloseWrite()
	r.wantEnd(testTimeout, registry.EOF)
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("got none within 5s, want %s", what)
		}
	}
}

func TestIdleCopierHoldsNoBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, client, backend := memRig(t, Settings{}, 1<<20)
		for _, size := range []int{1, firstSize - 1, 10_000, copySize + firstSize + 1, 300_000} {
			send(t, client, string(make([]byte, size)))
			wantText(t, backend, string(make([]byte, size)))
			synctest.Wait()
			if c := r.tunnel.up.carrier.(*copier); c.buf != nil || c.held != nil {
				t.Errorf("got a buffer held after %d bytes, want none", size)
			}
		}
	})
}

// What one tunnel could not deliver must not come out of another one.
func TestPipeThatIsNotEmptyIsNotUsedAgain(t *testing.T) {
	for range 20 {
		r, client, backend := tcpRig(t, Settings{}, "")
		block(t, client, &r.tunnel.up)
		other, client2, backend2 := tcpRig(t, Settings{}, "")
		breakOff(backend)
		r.wantEnd(2*time.Second, registry.Reset)
		send(t, client2, "clean")
		_ = client2.CloseWrite()
		if got, err := io.ReadAll(backend2); string(got) != "clean" || err != nil {
			t.Fatalf("got %d bytes, %v, want only those of its own client", len(got), err)
		}
		_ = backend2.Close()
		other.wantEnd(2*time.Second, registry.EOF)
	}
}

// Without descriptors for pipes bytes are copied.
func TestWithoutPipes(t *testing.T) {
	nearClient, client := tcpPair(t)
	nearBackend, backend := tcpPair(t)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = 1
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	}()
	r := start(t, Settings{}, nearClient, nearBackend, "")
	data := bytes.Repeat([]byte("0123456789"), 100_000)
	go func() {
		_, _ = client.Write(data)
		_ = client.CloseWrite()
	}()
	if got, err := io.ReadAll(backend); !bytes.Equal(got, data) || err != nil {
		t.Errorf("got %d bytes, %v, want %d", len(got), err, len(data))
	}
	_ = backend.Close()
	r.wantEnd(2*time.Second, registry.EOF)
	if _, copies := r.tunnel.up.carrier.(*copier); !copies {
		t.Error("got a pipe, want none to be had")
	}
}
