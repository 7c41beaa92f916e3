// This file runs Chromium.

package e2e

import (
	"context"
	"testing"
)

func TestBrowser(t *testing.T) {
	g := browserGuest{nodeGuest{startNode(t, "browser.cjs", tool(t, "chromium"))}}
	// A page may close with 1000 and with codes of its own.
	testGuest(t, g, habits{offers: true, needsReply: true, codes: []uint16{1000, 1005, 3000, 4999}})
}

// browserGuest is a page in Chromium, which is always open at the proxy's site.
type browserGuest struct{ nodeGuest }

func (g browserGuest) visit(ctx context.Context, p *proxy) error {
	return g.node.call(ctx, "visit", map[string]string{"url": "http://" + p.addr + "/"}, new(any))
}
