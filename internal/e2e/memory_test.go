package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// 2000 idle connections cost at most 15 KiB of resident memory each, also after
// each has echoed a message of 64 KiB; reverse_proxy is measured beside it.
func TestIdleMemory(t *testing.T) {
	const clients, most = 2000, 15.0
	backend := rawBackend(t, echoRaw)
	ours := startBinary(t, "", "websocket_proxy "+backend)
	theirs := startBinary(t, "", "reverse_proxy "+backend)

	idle, echoed := costOfIdle(t, ours, clients)
	idleTheirs, echoedTheirs := costOfIdle(t, theirs, clients)
	t.Logf("KiB per idle connection: %.1f, reverse_proxy %.1f (ratio %.2f); after one 64 KiB echo: %.1f, reverse_proxy %.1f (ratio %.2f); n=%d",
		idle, idleTheirs, idle/idleTheirs, echoed, echoedTheirs, echoed/echoedTheirs, clients)
	if idle > most || echoed > most {
		t.Errorf("KiB per idle connection: got %.1f and %.1f after an echo, want at most %.0f", idle, echoed, most)
	}
}

// costOfIdle opens n connections and returns what each costs in KiB, before and
// after every one of them has echoed a message of 64 KiB. It closes them.
func costOfIdle(t *testing.T, p *process, n int) (idle, echoed float64) {
	t.Helper()
	// What the first connections cost once is not what each costs.
	for range 100 {
		c := rawDial(t, p.addr, "")
		echoLarge(t, c)
		c.sendClose(t, 1000, "")
		_, _, _, _ = c.receiveClose()
		c.Close()
	}
	before := settledMemory(t, p)
	conns := make([]*rawConn, n)
	for i := range conns {
		conns[i] = rawDial(t, p.addr, "")
		_ = conns[i].SetDeadline(time.Now().Add(5 * time.Minute))
	}
	idle = (settledMemory(t, p) - before) / float64(n)
	var wg sync.WaitGroup
	for part := range 20 {
		wg.Go(func() {
			for i := part; i < n; i += 20 {
				echoLarge(t, conns[i])
			}
		})
	}
	wg.Wait()
	echoed = (settledMemory(t, p) - before) / float64(n)
	for _, c := range conns {
		c.Close()
	}
	return idle, echoed
}

// echoLarge sends a message of 64 KiB and reads it back.
func echoLarge(t *testing.T, c *rawConn) {
	message := strings.Repeat("x", 64<<10)
	c.send(t, ws.OpBinary, message)
	for got := 0; got < len(message); {
		_, payload, err := c.receive()
		if err != nil {
			t.Errorf("echo: %v", err)
			return
		}
		got += len(payload)
	}
}

// settledMemory is the process's resident memory in KiB once it stays the same,
// without what its heap has free. Garbage is collected first, and again for what pools
// keep until then: when that happens by itself, and when the system gets it back, is no
// property of idle connections.
func settledMemory(t testing.TB, p *process) float64 {
	t.Helper()
	for range 2 {
		if status, _ := p.request(t, "GET", "/debug/pprof/heap?gc=1"); status != 200 {
			t.Fatalf("collecting garbage: got status %d", status)
		}
	}
	return settled(func() float64 { return residentMemory(t, p.cmd.Process.Pid) }) - freeHeap(t, p)
}

// settled is what memory returns, in KiB, once that stays the same for a second.
func settled(memory func() float64) float64 {
	last, since := 0.0, time.Now()
	eventually(10*time.Second, func() bool {
		now := memory()
		if d := now - last; d > 256 || d < -256 {
			last, since = now, time.Now()
		}
		return time.Since(since) > time.Second
	})
	return last
}

// freeHeap is what the process's heap has free and resident, in KiB.
func freeHeap(t testing.TB, p *process) float64 {
	t.Helper()
	return goMemory(t, p, "heap_idle") - goMemory(t, p, "heap_released")
}

// goMemory is what the process's Go runtime says of its memory, in KiB.
func goMemory(t testing.TB, p *process, what string) float64 {
	t.Helper()
	prefix := "go_memstats_" + what + "_bytes "
	for _, line := range grep(p.scrape(t), prefix) {
		if n, err := strconv.ParseFloat(line[len(prefix):], 64); err == nil {
			return n / 1024
		}
	}
	t.Fatalf("no %sin the metrics", prefix)
	return 0
}

// residentMemory is a process's resident memory in KiB.
func residentMemory(t testing.TB, pid int) float64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(status), "\n") {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "VmRSS:" {
			kib, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib
		}
	}
	t.Fatal("no VmRSS")
	return 0
}
